{{/* Names and labels. */}}

{{/*
The release; inside another chart, together with the name of the dependency there (its alias, if it has one), since the
release and its name belong to all charts in it. 53 characters at most, as a release has, so that names that begin with
it fit; a name that is cut gets a hash of the whole.
*/}}
{{- define "finetune-job.instance" -}}
{{- $name := .Release.Name -}}
{{- if not .Chart.IsRoot -}}
{{- $name = printf "%s-%s" .Release.Name .Chart.Name -}}
{{- end -}}
{{- if gt (len $name) 53 -}}
{{- printf "%s-%s" ($name | trunc 44 | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{/* The same as a DNS label: everything but Job and CronJob is called that. */}}
{{- define "finetune-job.name" -}}
{{- include "finetune-job.instance" . | replace "." "-" -}}
{{- end -}}

{{/*
A Job's spec is immutable, so its name carries a hash of all that it is made of: an upgrade with a change makes a new
Job, one without a change makes none. 63 characters at most, and the hash is never what is cut.
*/}}
{{- define "finetune-job.jobName" -}}
{{- $spec := include "finetune-job.jobSpec" . | fromYaml | toJson -}}{{/* as data: a comment is no change */}}
{{- $hash := print $spec (include "finetune-job.jobLabels" .) | sha256sum | trunc 8 -}}
{{- printf "%s-%s" (include "finetune-job.name" . | trunc 54 | trimSuffix "-") $hash -}}
{{- end -}}

{{/* 52 characters at most, since the controller appends the time to it. A name that is cut gets a hash of the whole. */}}
{{- define "finetune-job.cronJobName" -}}
{{- $name := include "finetune-job.name" . -}}
{{- if gt (len $name) 52 -}}
{{- printf "%s-%s" ($name | trunc 43 | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- define "finetune-job.serviceAccountName" -}}
{{- $fallback := ternary (include "finetune-job.name" .) "default" .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default $fallback -}}
{{- end -}}

{{/* What selects this release's pods. */}}
{{- define "finetune-job.selector" -}}
app.kubernetes.io/name: finetune-job
app.kubernetes.io/instance: {{ include "finetune-job.instance" . | quote }}
{{- end -}}

{{/* Labels of every object. Not of the pods: the chart's version would change the Job's name. */}}
{{- define "finetune-job.labels" -}}
{{ include "finetune-job.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Kueue asks for its label on the Job and suspends and resumes it by itself. */}}
{{- define "finetune-job.jobLabels" -}}
{{- with .Values.kueue.queueName -}}
kueue.x-k8s.io/queue-name: {{ . | quote }}
{{- end -}}
{{- end -}}

{{- define "finetune-job.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end -}}
