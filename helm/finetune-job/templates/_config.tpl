{{/* The TUNE_* settings: how values become text, the run's identity, the grace. */}}

{{/*
A value as the environment has it. Helm reads every YAML number as a float, and a million would print as 1e+06, which is
no whole number to the job.
*/}}
{{- define "finetune-job.text" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (float64 .) (floor .)) -}}
{{- printf "%.0f" . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* `config` as a map of texts, as JSON. What is null is left out. YAML reads `on` and `off` as booleans: undone here. */}}
{{- define "finetune-job.settings" -}}
{{- $texts := dict -}}
{{- $switches := list -}}
{{- range .Files.Get "files/variables.json" | fromJsonArray -}}
{{- if eq .type "switch" -}}{{- $switches = append $switches .name -}}{{- end -}}
{{- end -}}
{{- range $name, $value := .Values.config -}}
{{- if kindIs "invalid" $value -}}
{{- else if and (kindIs "bool" $value) (has $name $switches) -}}
{{- $_ := set $texts $name (ternary "on" "off" $value) -}}
{{- else -}}
{{- $_ := set $texts $name (include "finetune-job.text" $value) -}}
{{- end -}}
{{- end -}}
{{- toJson $texts -}}
{{- end -}}

{{/*
A hash of the settings that decide the result, so that more memory, another image pull policy or TUNE_ALLOW_CHANGE resume
the run and another learning rate begins another one. Those at their defaults are left out: a later chart with a variable
more continues the same run. `2e-4` and 0.0002 are one value.
*/}}
{{- define "finetune-job.fingerprint" -}}
{{- $settings := include "finetune-job.settings" . | fromJson -}}
{{- $lines := list -}}
{{- range .Files.Get "files/variables.json" | fromJsonArray -}}
{{- if .fingerprint -}}
{{- $default := include "finetune-job.canonical" (list .type .default) -}}
{{- $value := include "finetune-job.canonical" (list .type (get $settings .name | default .default)) -}}
{{- $file := get $settings (print .name "_FILE") -}}
{{- if or $file (ne $value $default) -}}
{{- $lines = append $lines (printf "%s=%s %s" .name $value $file) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- join "\n" $lines | sha256sum | trunc 8 -}}
{{- end -}}

{{/* A value as it is compared: takes its type and its text. */}}
{{- define "finetune-job.canonical" -}}
{{- $value := index . 1 -}}
{{- if and (eq (index . 0) "number") (ne $value "auto") (ne $value "") -}}
{{- float64 $value | toString -}}
{{- else if eq (index . 0) "list" -}}
{{- $value | replace " " "" -}}
{{- else -}}
{{- $value -}}
{{- end -}}
{{- end -}}

{{/* The run id of job mode. Two Jobs with one run id are safe: the older one is fenced off. */}}
{{- define "finetune-job.runId" -}}
{{- $settings := include "finetune-job.settings" . | fromJson -}}
{{- get $settings "TUNE_RUN_ID" | default (printf "%s-%s" (include "finetune-job.instance" .) (include "finetune-job.fingerprint" .)) -}}
{{- end -}}

{{/* Seconds that the run has after SIGTERM: what the pod asks for, or less where the platform leaves less. */}}
{{- define "finetune-job.grace" -}}
{{- $grace := int .Values.terminationGracePeriodSeconds -}}
{{- if .Values.spot.enabled -}}
{{- $grace = min $grace (int .Values.spot.graceSeconds) -}}
{{- end -}}
{{- $grace -}}
{{- end -}}

{{/*
The TUNE_* variables that the chart sets. They stand in the pod itself and not in a config map: a pod that is replaced in
the middle of a run must see the values it began with, also after an upgrade.
*/}}
{{- define "finetune-job.tuneEnv" -}}
{{- $settings := include "finetune-job.settings" . | fromJson -}}
{{- if not (or (hasKey $settings "TUNE_RUN_ID") (hasKey $settings "TUNE_RUN_ID_FILE")) }}
- name: TUNE_RUN_ID
{{- if eq .Values.mode "cronjob" }}
  # Every scheduled run is a run of its own, and a retry belongs to its Job. In a pod without a Job (`helm test`) this
  # is empty, and an empty variable is an unset one.
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['batch.kubernetes.io/job-name']
{{- else }}
  value: {{ include "finetune-job.runId" . | quote }}
{{- end }}
{{- end }}
{{- if not (or (hasKey $settings "TUNE_GRACE_SECONDS") (hasKey $settings "TUNE_GRACE_SECONDS_FILE")) }}
- name: TUNE_GRACE_SECONDS
  value: {{ include "finetune-job.grace" . | quote }}
{{- end }}
{{- if and (eq (int .Values.gpu.count) 0) (not (hasKey $settings "TUNE_DEVICE")) }}
- name: TUNE_DEVICE
  value: cpu
{{- end }}
{{- if .Values.metrics.enabled }}
- name: TUNE_METRICS_PORT
  value: {{ .Values.metrics.port | int | quote }}
{{- end }}
{{- range $name := keys $settings | sortAlpha }}
- name: {{ $name }}
  value: {{ get $settings $name | quote }}
{{- end }}
{{- end -}}
