{{/* What the schema cannot say, or cannot say so that a user knows what to do. All problems at once. */}}

{{- define "finetune-job.check" -}}
{{- $problems := concat
      (include "finetune-job.configProblems" . | fromJsonArray)
      (include "finetune-job.valueProblems" . | fromJsonArray) -}}
{{- if $problems -}}
{{- fail (printf "\nThe values are not valid.\n- %s\n" (join "\n- " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "finetune-job.configProblems" -}}
{{- $found := list -}}
{{- $settings := include "finetune-job.settings" . | fromJson -}}
{{- range .Files.Get "files/variables.json" | fromJsonArray -}}
{{- $value := get $settings .name -}}
{{- $file := print .name "_FILE" -}}
{{- if and .required (not $value) (not (get $settings $file)) -}}
{{- $found = append $found (printf "config.%s is not set. It is required: %s (%s). Set it, or config.%s to the path of a mounted file." .name .rule .meaning $file) -}}
{{- end -}}
{{- if and $value (get $settings $file) -}}
{{- $found = append $found (printf "config.%s and config.%s are both set. Keep one of them." .name $file) -}}
{{- end -}}
{{- if and (eq .type "number") $value (ne $value "auto") -}}
{{- $number := float64 $value -}}
{{- $low := and (hasKey . "minimum") (lt $number (float64 (.minimum | default 0))) -}}
{{- $atOrBelow := and (hasKey . "exclusiveMinimum") (le $number (float64 (.exclusiveMinimum | default 0))) -}}
{{- $high := and (hasKey . "maximum") (gt $number (float64 (.maximum | default 0))) -}}
{{- if or $low $atOrBelow $high -}}
{{- $found = append $found (printf "config.%s=%s is not valid. Expected: %s." .name $value .rule) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $device := get $settings "TUNE_DEVICE" -}}
{{- if and (eq (int .Values.gpu.count) 0) (eq $device "cuda") -}}
{{- $found = append $found "config.TUNE_DEVICE=cuda needs a GPU and gpu.count is 0. Set gpu.count to 1, or leave TUNE_DEVICE out." -}}
{{- end -}}
{{- if and (gt (int .Values.gpu.count) 0) (eq $device "cpu") -}}
{{- $found = append $found "config.TUNE_DEVICE=cpu would leave the GPU that the pod asks for idle. Set gpu.count to 0." -}}
{{- end -}}
{{- range $name := list "TUNE_DEVICE_FILE" "TUNE_LOG_FORMAT_FILE" -}}
{{- if hasKey $settings $name -}}
{{- $found = append $found (printf "config.%s cannot be used: the image sets %s. Set config.%s itself." $name (trimSuffix "_FILE" $name) (trimSuffix "_FILE" $name)) -}}
{{- end -}}
{{- end -}}
{{- $micro := get $settings "TUNE_MICRO_BATCH" | default "auto" -}}
{{- $batch := get $settings "TUNE_BATCH_SIZE" | default "8" -}}
{{- if and (ne $micro "auto") (gt (int $micro) (int $batch)) -}}
{{- $found = append $found (printf "config.TUNE_MICRO_BATCH=%s is more than TUNE_BATCH_SIZE=%s. Lower it." $micro $batch) -}}
{{- end -}}
{{- if and .Values.metrics.enabled (has (get $settings "TUNE_LOG_LEVEL") (list "warning" "error")) -}}
{{- $found = append $found (printf "metrics.enabled takes its numbers from log events of level info, and config.TUNE_LOG_LEVEL=%s drops them. Set TUNE_LOG_LEVEL to info." (get $settings "TUNE_LOG_LEVEL")) -}}
{{- end -}}
{{- if and (eq (int .Values.gpu.count) 0) (eq (get $settings "TUNE_PRECISION") "8bit") -}}
{{- $found = append $found "config.TUNE_PRECISION=8bit needs a GPU and gpu.count is 0. Use 4bit or 16bit." -}}
{{- end -}}
{{- if and (eq (get $settings "TUNE_RESUME") "fresh") (or .Values.spot.enabled (eq .Values.mode "cronjob")) -}}
{{- $found = append $found "config.TUNE_RESUME=fresh starts over at every start of a pod, so that a preempted run never makes progress. Set another TUNE_RUN_ID to start over." -}}
{{- end -}}
{{- if or (hasKey $settings "TUNE_METRICS_PORT") (hasKey $settings "TUNE_METRICS_PORT_FILE") -}}
{{- $found = append $found "config.TUNE_METRICS_PORT is set by the chart. Set metrics.enabled and metrics.port instead." -}}
{{- end -}}
{{- $grace := include "finetune-job.grace" . -}}
{{- if gt (float64 (get $settings "TUNE_GRACE_SECONDS" | default "0")) (float64 $grace) -}}
{{- $found = append $found (printf "config.TUNE_GRACE_SECONDS=%s is more than the platform leaves (%s s: terminationGracePeriodSeconds, and spot.graceSeconds on spot nodes). Leave it out, or raise those." (get $settings "TUNE_GRACE_SECONDS") $grace) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/*
Whether a resource is an accelerator, whole, shared or a slice: nvidia.com/gpu.shared, nvidia.com/mig-1g.10gb, amd.com/gpu.
Memory and cores of one (nvidia.com/gpumem, as vGPU schedulers have them) say how much of it, and are none.
*/}}
{{- define "finetune-job.isAccelerator" -}}
{{- $name := lower . -}}
{{- if and (regexMatch "^gpu\\.intel\\.com/|/(.*[.-])?([pv]?gpu|mig-|gaudi|neuron|tpu|npu|ascend)" $name) (not (regexMatch "gpu.*(mem|memory|cores?|percentage|priority)$" $name)) -}}
true
{{- end -}}
{{- end -}}

{{- define "finetune-job.valueProblems" -}}
{{- $found := list -}}
{{- if gt (int .Values.gpu.count) 1 -}}
{{- $found = append $found (printf "gpu.count=%d: the job trains on one GPU and would leave the others idle. Set it to 1, or to 0 to train on the CPU." (int .Values.gpu.count)) -}}
{{- end -}}
{{- $requests := .Values.resources.requests | default dict -}}
{{- $limits := .Values.resources.limits | default dict -}}
{{- range $part, $amounts := dict "requests" $requests "limits" $limits -}}
{{- range $name := keys $amounts | sortAlpha -}}
{{- if eq $name $.Values.gpu.resource -}}
{{- $found = append $found (printf "resources.%s names %s. Set gpu.count instead." $part $name) -}}
{{- else if include "finetune-job.isAccelerator" $name -}}
{{- $found = append $found (printf "resources.%s names %s, which the pod would ask for besides gpu.count=%d of %s. Set gpu.resource to %s and gpu.count to 1 instead." $part $name (int $.Values.gpu.count) $.Values.gpu.resource $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := keys $requests | sortAlpha -}}
{{- if and (or (contains "/" $name) (hasPrefix "hugepages-" $name)) (not (include "finetune-job.isAccelerator" $name)) (ne (toString (get $requests $name)) (toString (get $limits $name))) -}}
{{- $found = append $found (printf "resources.requests names %s, and resources.limits does not name it with the same amount: Kubernetes refuses such a pod. Set both to the same." $name) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int .Values.gpu.count) 0) (regexMatch "^(amd\\.com|gpu\\.intel\\.com|habana\\.ai|aws\\.amazon\\.com|google\\.com|huawei\\.com)/" .Values.gpu.resource) -}}
{{- $found = append $found (printf "gpu.resource is %s: the image trains on NVIDIA GPUs. Set it to nvidia.com/gpu or the name of a slice, or gpu.count to 0." .Values.gpu.resource) -}}
{{- end -}}
{{- if and (hasKey .Values "enabled") (not .Values.enabled) -}}
{{- $found = append $found (printf "enabled is false, and the chart is installed all the same: only a chart that depends on this one can leave it out. Give its dependency `condition: %s.enabled`." .Chart.Name) -}}
{{- end -}}
{{- if and (eq .Values.mode "cronjob") (not .Values.cron.schedule) -}}
{{- $found = append $found "mode is cronjob and cron.schedule is empty. Set five fields such as \"0 3 * * 0\", or @weekly." -}}
{{- end -}}
{{- if and (eq .Values.mode "job") .Values.cron.schedule -}}
{{- $found = append $found (printf "cron.schedule is %q and mode is job, which starts one run now. Set mode to cronjob, or leave the schedule out." .Values.cron.schedule) -}}
{{- end -}}
{{- if and (eq .Values.mode "cronjob") .Values.keepOnUpgrade -}}
{{- $found = append $found "keepOnUpgrade is true and mode is cronjob: an upgrade never touches the Jobs of a schedule. Leave it out." -}}
{{- end -}}
{{- if and .Values.spot.provider (not .Values.spot.enabled) -}}
{{- $found = append $found (printf "spot.provider is %s and spot.enabled is false: the run would not be on spot nodes. Set spot.enabled to true." .Values.spot.provider) -}}
{{- end -}}
{{- if and .Values.networkPolicy.egress (not .Values.networkPolicy.enabled) -}}
{{- $found = append $found "networkPolicy.egress is set and networkPolicy.enabled is false: nothing would be limited. Set networkPolicy.enabled to true." -}}
{{- end -}}
{{- if and .Values.scratch.claimName (ne .Values.scratch.type "pvc") -}}
{{- $found = append $found (printf "scratch.claimName is set and scratch.type is %s. Set scratch.type to pvc." .Values.scratch.type) -}}
{{- end -}}
{{- if and .Values.scratch.storageClassName (ne .Values.scratch.type "ephemeral") -}}
{{- $found = append $found (printf "scratch.storageClassName is set and scratch.type is %s. Set scratch.type to ephemeral." .Values.scratch.type) -}}
{{- end -}}
{{- range $name, $url := dict "s3.endpoint" .Values.s3.endpoint "proxy.httpsProxy" .Values.proxy.httpsProxy "proxy.httpProxy" .Values.proxy.httpProxy -}}
{{- if contains "@" $url -}}
{{- $found = append $found (printf "%s holds a user or password, which would stand in the Job for all to read. Put the variable into a secret and name it in existingSecrets." $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.caBundle.configMap .Values.caBundle.secret -}}
{{- $found = append $found "caBundle.configMap and caBundle.secret are both set. Keep one of them." -}}
{{- end -}}
{{- if and (eq .Values.scratch.type "pvc") (not .Values.scratch.claimName) -}}
{{- $found = append $found "scratch.type is pvc and scratch.claimName is empty. Name the claim, or choose emptyDir or ephemeral." -}}
{{- end -}}
{{- if and .Values.spot.enabled (not .Values.spot.provider) -}}
{{- $found = append $found "spot.enabled is true and spot.provider is empty. Choose gke, eks, karpenter or aks, or other with a nodeSelector and tolerations of your own." -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.metrics.enabled) -}}
{{- $found = append $found "metrics.podMonitor.enabled needs the endpoint that it reads. Set metrics.enabled to true." -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) -}}
{{- $found = append $found "networkPolicy.enabled is true and networkPolicy.egress is empty: the run could reach no store. List the store's addresses and ports." -}}
{{- end -}}
{{- if and .Values.serviceAccount.annotations (not .Values.serviceAccount.create) -}}
{{- $found = append $found "serviceAccount.annotations are set and serviceAccount.create is false: the chart cannot annotate an account that it does not make. Annotate it yourself, or set create to true." -}}
{{- end -}}
{{- $own := list -}}
{{- range include "finetune-job.ownEnv" . | fromYamlArray -}}
{{- $own = append $own .name -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if hasPrefix "TUNE_" .name -}}
{{- $found = append $found (printf "extraEnv names %s. Settings of the run belong under config, where they are checked." .name) -}}
{{- else if has .name $own -}}
{{- $found = append $found (printf "extraEnv names %s, which the chart sets (itself, or from s3, proxy, caBundle or gpu). Remove it from extraEnv." .name) -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}
