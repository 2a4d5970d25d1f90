{{/* What a schema cannot say: settings that contradict each other fail with the remedy. */}}
{{- define "poise.checks" -}}
{{- $values := .Values -}}
{{- $sources := compact (list $values.model.claim $values.model.download.repository $values.model.builtin) -}}
{{- if gt (len $sources) 1 -}}
{{- fail "model.claim, model.download.repository and model.builtin: keep one, the one that holds the model" -}}
{{- end -}}
{{- if and (not $sources) (not (hasPrefix "/" $values.model.path)) -}}
{{- fail "no model: set model.download.repository, model.claim or model.builtin, or give model.path as an absolute path that the images hold" -}}
{{- end -}}
{{- if and (not $values.valkey.enabled) (not $values.valkey.externalSecret) -}}
{{- fail "no queue: set valkey.enabled: true, or valkey.externalSecret to a secret whose key url names a Redis" -}}
{{- end -}}
{{- if and $values.tls.enabled (not $values.tls.existingSecret) (not $values.tls.issuer.name) -}}
{{- fail "tls.enabled needs tls.existingSecret, or tls.issuer.name for cert-manager" -}}
{{- end -}}
{{- if and $values.train.enabled (not $values.train.config.tasks) -}}
{{- fail "train.config.tasks is empty: say what to train on, or set train.enabled: false" -}}
{{- end -}}
{{- $scaling := $values.generation.autoscaling -}}
{{- if and $scaling.enabled (lt (int $scaling.maxReplicas) (int $scaling.minReplicas)) -}}
{{- fail "generation.autoscaling.maxReplicas is below minReplicas" -}}
{{- end -}}
{{- if and $scaling.enabled (eq $scaling.through "keda") (not $scaling.prometheusUrl) -}}
{{- fail "generation.autoscaling.through is keda: set generation.autoscaling.prometheusUrl, which it asks" -}}
{{- end -}}
{{- if and $scaling.enabled (eq $scaling.through "hpa") (not $values.monitoring.rules) -}}
{{- fail "generation.autoscaling goes by a recorded metric: set monitoring.rules, and let a Prometheus adapter serve poise_learner_waiting_ratio" -}}
{{- end -}}
{{- if and $values.train.dataConfigMap $values.train.dataClaim -}}
{{- fail "train.dataConfigMap and train.dataClaim are both set: keep one, /data is mounted once" -}}
{{- end -}}
{{- end }}
