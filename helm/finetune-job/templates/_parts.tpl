{{/* Parts of the pod that take some deciding. */}}

{{/* How each platform marks its spot nodes. */}}
{{- define "finetune-job.spotNodes" -}}
gke:
  nodeSelector:
    cloud.google.com/gke-spot: "true"
  tolerations:
    - key: cloud.google.com/gke-spot
      operator: Equal
      value: "true"
      effect: NoSchedule
eks:
  nodeSelector:
    eks.amazonaws.com/capacityType: SPOT
karpenter:
  nodeSelector:
    karpenter.sh/capacity-type: spot
aks:
  nodeSelector:
    kubernetes.azure.com/scalesetpriority: spot
  tolerations:
    - key: kubernetes.azure.com/scalesetpriority
      operator: Equal
      value: spot
      effect: NoSchedule
{{- end -}}

{{- define "finetune-job.spot" -}}
{{- $nodes := dict -}}
{{- if .Values.spot.enabled -}}
{{- $nodes = get (include "finetune-job.spotNodes" . | fromYaml) .Values.spot.provider | default dict -}}
{{- end -}}
{{- toYaml $nodes -}}
{{- end -}}

{{- define "finetune-job.nodeSelector" -}}
{{- $spot := get (include "finetune-job.spot" . | fromYaml) "nodeSelector" | default dict -}}
{{- toYaml (merge (deepCopy .Values.nodeSelector) $spot) -}}
{{- end -}}

{{- define "finetune-job.tolerations" -}}
{{- $spot := get (include "finetune-job.spot" . | fromYaml) "tolerations" | default list -}}
{{- $gpu := ternary .Values.gpu.tolerations list (gt (int .Values.gpu.count) 0) -}}
{{- toYaml (concat $gpu $spot .Values.tolerations) -}}
{{- end -}}

{{- define "finetune-job.resources" -}}
{{- $requests := deepCopy (.Values.resources.requests | default dict) -}}
{{- $limits := deepCopy (.Values.resources.limits | default dict) -}}
{{- if gt (int .Values.gpu.count) 0 -}}
{{- $_ := set $limits .Values.gpu.resource (toString (int .Values.gpu.count)) -}}
{{- end -}}
{{- if and (eq .Values.scratch.type "emptyDir") (not (hasKey $requests "ephemeral-storage")) -}}
{{/* Without it the pod may land on a node whose disk is too small, and is evicted in the middle of the run. */}}
{{- $_ := set $requests "ephemeral-storage" .Values.scratch.size -}}
{{- end -}}
{{- toYaml (dict "requests" $requests "limits" $limits) -}}
{{- end -}}

{{- define "finetune-job.scratch" -}}
{{- if eq .Values.scratch.type "emptyDir" -}}
emptyDir:
  sizeLimit: {{ .Values.scratch.size }}
{{- else if eq .Values.scratch.type "ephemeral" -}}
ephemeral:
  volumeClaimTemplate:
    metadata:
      labels:
        {{- include "finetune-job.selector" . | nindent 8 }}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .Values.scratch.storageClassName }}
      storageClassName: {{ . | quote }}
      {{- end }}
      resources:
        requests:
          storage: {{ .Values.scratch.size }}
{{- else -}}
persistentVolumeClaim:
  claimName: {{ .Values.scratch.claimName | quote }}
{{- end -}}
{{- end -}}

{{- define "finetune-job.caVolume" -}}
{{- if .Values.caBundle.configMap -}}
- name: ca
  configMap:
    name: {{ .Values.caBundle.configMap | quote }}
    items:
      - key: {{ .Values.caBundle.key | quote }}
        path: ca.crt
{{- else if .Values.caBundle.secret -}}
- name: ca
  secret:
    secretName: {{ .Values.caBundle.secret | quote }}
    items:
      - key: {{ .Values.caBundle.key | quote }}
        path: ca.crt
{{- end -}}
{{- end -}}
