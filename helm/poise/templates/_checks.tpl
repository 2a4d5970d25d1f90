{{/* Checks beyond the schema: settings that contradict each other fail with the remedy. */}}
{{- define "poise.checks" -}}
{{- $values := .Values -}}
{{- $sources := compact (list $values.model.claim $values.model.download.repository $values.model.builtin) -}}
{{- if gt (len $sources) 1 -}}
{{- fail "more than one of model.claim, model.download.repository and model.builtin is set: keep one" -}}
{{- end -}}
{{- range $role := list "generation" "learner" -}}
{{- if and $values.model.builtin (ne $values.model.builtin "tiny") (hasSuffix (printf "poise-%s" $role) (include "poise.repository" (dict "root" $ "role" $role))) -}}
{{- fail (printf "model.builtin %s is built only by the image poise-cpu: set images.%s: poise-cpu, or use model.download or model.claim" $values.model.builtin $role) -}}
{{- end -}}
{{- end -}}
{{- if and (not $sources) (not (hasPrefix "/" $values.model.path)) -}}
{{- fail "no model: set model.download.repository, model.claim or model.builtin, or set model.path to an absolute path in the images" -}}
{{- end -}}
{{- if and (not $values.valkey.enabled) (not $values.valkey.externalSecret) -}}
{{- fail "no queue: set valkey.enabled: true, or set valkey.externalSecret to a secret whose key url is the address of a Redis" -}}
{{- end -}}
{{- if and $values.valkey.enabled $values.valkey.externalSecret -}}
{{- fail "valkey.externalSecret names a queue and valkey.enabled starts another: set valkey.enabled: false, or leave externalSecret empty" -}}
{{- end -}}
{{- if and $values.tls.enabled (not $values.tls.existingSecret) (not $values.tls.issuer.name) -}}
{{- fail "tls.enabled needs tls.existingSecret, or tls.issuer.name for cert-manager" -}}
{{- end -}}
{{- if and $values.train.enabled (not $values.train.config.tasks) -}}
{{- fail "train.config.tasks is empty: list tasks to train on, or set train.enabled: false" -}}
{{- end -}}
{{- $scaling := $values.generation.autoscaling -}}
{{- if and $scaling.enabled (lt (int $scaling.maxReplicas) (int $scaling.minReplicas)) -}}
{{- fail "generation.autoscaling.maxReplicas is below minReplicas: raise it" -}}
{{- end -}}
{{- if and $scaling.enabled (eq $scaling.through "keda") (not $scaling.prometheusUrl) -}}
{{- fail "generation.autoscaling.through is keda, which queries Prometheus: set generation.autoscaling.prometheusUrl" -}}
{{- end -}}
{{- if and $scaling.enabled (eq $scaling.through "hpa") (not $values.monitoring.rules) -}}
{{- fail "generation.autoscaling needs a recorded metric: set monitoring.rules, and serve poise_learner_waiting_ratio with a Prometheus adapter" -}}
{{- end -}}
{{- if and $scaling.enabled (not $values.monitoring.podMonitor) -}}
{{- fail "generation.autoscaling needs the learner's metrics in Prometheus: set monitoring.podMonitor" -}}
{{- end -}}
{{- if and $scaling.enabled $values.train.enabled (le (int $values.train.config.max_staleness) 0) -}}
{{- fail "generation.autoscaling needs train.config.max_staleness above 0: otherwise the learner waits in every step" -}}
{{- end -}}
{{- if and $values.train.enabled (gt (int $values.train.config.max_staleness) (int $values.learner.config.max_staleness)) -}}
{{- fail "train.config.max_staleness is above learner.config.max_staleness, so rollouts would be rejected: raise the learner's or lower the loop's" -}}
{{- end -}}
{{- $algorithm := $values.train.config.algorithm | default "poise" -}}
{{- if not (kindIs "map" $algorithm) }}{{ $algorithm = dict "kind" $algorithm }}{{ end -}}
{{- $estimator := include "poise.estimator" . -}}
{{- if and $values.train.enabled (eq ($algorithm.kind | default "poise") "poise") $values.value.config.estimator (ne $estimator $values.value.config.estimator) -}}
{{- fail (printf "value.config.estimator is %s, but train.config.algorithm %s: set only train.config.algorithm, such as {kind: poise, estimator: %s}" $values.value.config.estimator (ternary (printf "has estimator %s" $estimator) "names no estimator" (ne $estimator "")) $values.value.config.estimator) -}}
{{- end -}}
{{- if and $values.monitoring.podMonitor $values.networkPolicy.enabled (not $values.networkPolicy.monitors) -}}
{{- fail "monitoring.podMonitor is set, but the network policies admit no Prometheus: name it in networkPolicy.monitors" -}}
{{- end -}}
{{- $transport := include "poise.transport" . -}}
{{- if eq $transport "shared" -}}
{{- fail "learner.config.push.transport is shared, but pods have no folder in common: set grpc, or nccl between GPUs" -}}
{{- end -}}
{{- if and (eq $transport "lora") (not (hasKey $values.generation.config "lora")) -}}
{{- fail "learner.config.push.transport is lora, but no replica accepts adapters: set generation.config.lora, or use grpc" -}}
{{- end -}}
{{- if eq $transport "nccl" -}}
{{- if or (eq (int $values.generation.gpus) 0) (eq (int $values.learner.gpusPerNode) 0) -}}
{{- fail "learner.config.push.transport is nccl, which needs GPUs: set generation.gpus and learner.gpusPerNode above 0, or use grpc" -}}
{{- end -}}
{{- $image := include "poise.repository" (dict "root" $ "role" "learner") -}}
{{- if or (hasSuffix "poise-learner" $image) (hasSuffix "poise-cpu" $image) -}}
{{- fail (printf "learner.config.push.transport is nccl, which needs vLLM, and images.learner %s has none: set images.learner: poise-generation, or use grpc" $values.images.learner) -}}
{{- end -}}
{{- end -}}
{{- range $path, $folders := dict "learner.export_dir" (list "/state" "/tmp") "generation.staging_dir" (list "/dev/shm" "/tmp") -}}
{{- $role := splitList "." $path | first -}}
{{- $folder := get (index $values $role).config (splitList "." $path | last) | default "" -}}
{{- $isMounted := not $folder -}}
{{- range $folders }}{{ if or (eq $folder .) (hasPrefix (printf "%s/" .) $folder) }}{{ $isMounted = true }}{{ end }}{{ end -}}
{{- if not $isMounted -}}
{{- fail (printf "%s.config.%s is %s, where the pod has no volume: choose a folder in %s" $role (splitList "." $path | last) $folder (join " or " $folders)) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "generation" "value" "learner" "train" "valkey" -}}
{{- range $toleration := (index $values $role).tolerations -}}
{{- if and (not $toleration.key) (not (has ($toleration.effect | default "") (list "NoSchedule" "PreferNoSchedule"))) (not (hasKey $toleration "tolerationSeconds")) -}}
{{- fail (printf "%s.tolerations tolerates every taint, including node.kubernetes.io/out-of-service, which replaces pods of a lost node: name the key, or set effect: NoSchedule" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $values.train.dataConfigMap $values.train.dataClaim -}}
{{- fail "train.dataConfigMap and train.dataClaim are both set, but /data is mounted once: keep one" -}}
{{- end -}}
{{- end }}
