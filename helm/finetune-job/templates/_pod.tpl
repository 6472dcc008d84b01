{{/*
THE pod: Job, CronJob and the pre-flight test are made from this one template.
Takes a dict: `root` (the chart's scope) and `args` (the container's arguments; none means `train`).
*/}}
{{- define "finetune-job.pod" -}}
{{- $args := .args -}}
{{- with .root -}}
metadata:
  labels:
    {{- include "finetune-job.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "finetune-job.serviceAccountName" . | quote }}
  # The job never talks to the Kubernetes API. IRSA, EKS Pod Identity and Azure add a token of their own, and GKE's
  # metadata server asks for one on the pod's behalf: none of them needs this one.
  automountServiceAccountToken: false
  # No variables that describe other services: they reveal much and are never read.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int .Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with include "finetune-job.nodeSelector" . | fromYaml }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "finetune-job.tolerations" . | fromYamlArray }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: finetune-job
      image: {{ include "finetune-job.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- with $args }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        {{- include "finetune-job.env" . | nindent 8 }}
      {{- with .Values.existingSecrets }}
      envFrom:
        {{- range . }}
        - secretRef:
            name: {{ . | quote }}
        {{- end }}
      {{- end }}
      {{- if and .Values.metrics.enabled (not $args) }}
      ports:
        - name: metrics
          containerPort: {{ int .Values.metrics.port }}
      {{- end }}
      resources:
        {{- include "finetune-job.resources" . | nindent 8 }}
      # The job writes why it ended there; a pod that died before that shows the end of its log instead.
      terminationMessagePolicy: FallbackToLogsOnError
      # Not a value: where the "restricted" standard is enforced no other pod is admitted, and the job needs no more.
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: scratch
          mountPath: /scratch
        - name: shm
          mountPath: /dev/shm
        {{- if or .Values.caBundle.configMap .Values.caBundle.secret }}
        - name: ca
          mountPath: /etc/finetune-job/ca
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: scratch
      {{- include "finetune-job.scratch" . | nindent 6 }}
    # PyTorch's workers pass batches through it; the runtime's default of 64 MiB is too small.
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.sharedMemory }}
    {{- with include "finetune-job.caVolume" . }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
{{- end -}}
