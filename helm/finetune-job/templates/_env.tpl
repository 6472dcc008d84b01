{{/* The container's environment besides the run's own settings: who it is, and how it reaches its stores. */}}

{{/* What the chart sets, and nothing else. */}}
{{- define "finetune-job.ownEnv" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- include "finetune-job.tuneEnv" . }}
{{- if eq (int .Values.gpu.count) 0 }}
# The image asks for all GPUs, and a node whose default runtime is NVIDIA's would hand them over unaccounted.
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end }}
{{- with .Values.s3.endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.region }}
- name: AWS_REGION
  value: {{ . | quote }}
# boto3 reads this one.
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- if or .Values.caBundle.configMap .Values.caBundle.secret }}
{{- range list "AWS_CA_BUNDLE" "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" }}
- name: {{ . }}
  value: /etc/finetune-job/ca/ca.crt
{{- end }}
{{- end }}
{{- range $name, $value := dict "HTTPS_PROXY" .Values.proxy.httpsProxy "HTTP_PROXY" .Values.proxy.httpProxy "NO_PROXY" .Values.proxy.noProxy }}
{{- with $value }}
- name: {{ $name }}
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "finetune-job.env" -}}
{{ include "finetune-job.ownEnv" . }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
