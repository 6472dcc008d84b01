{{/* The spec of a Job, alone or inside a CronJob. */}}
{{- define "finetune-job.jobSpec" -}}
completions: 1
parallelism: 1
backoffLimit: {{ int .Values.backoffLimit }}
activeDeadlineSeconds: {{ int .Values.activeDeadlineSeconds }}
{{- if not (kindIs "invalid" .Values.ttlSecondsAfterFinished) }}
ttlSecondsAfterFinished: {{ int .Values.ttlSecondsAfterFinished }}
{{- end }}
# A new pod only once the old one has ended: two at a time would take the run from each other.
podReplacementPolicy: Failed
# The first rule that matches decides. What no rule matches (74 storage, 1 unknown, 137 killed) counts.
podFailurePolicy:
  rules:
    # config 78, data 65, denied 77, permanent 70, fenced 76: trying again would end the same way.
    - action: FailJob
      onExitCodes:
        containerName: finetune-job
        operator: In
        values: [65, 70, 76, 77, 78]
    # Preempted, drained, evicted: not the run's fault, whatever the code.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # interrupted: asked to stop before Kubernetes says why.
    - action: Ignore
      onExitCodes:
        containerName: finetune-job
        operator: In
        values: [75]
template:
  {{- include "finetune-job.pod" (dict "root" .) | nindent 2 }}
{{- end -}}
