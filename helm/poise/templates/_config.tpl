{{/* Settings of each program: the user's tree, overridden by what only the chart knows. */}}

{{- define "poise.serviceConfig" -}}
{{- $drain := dict "generation" 120 "value" 30 "learner" 300 -}}
grpc:
  host: "::" # both families; only IPv4 where a node has no IPv6
  port: {{ include "poise.grpcPort" .role }}
  {{- if .root.Values.tls.enabled }}
  tls_cert_file: /etc/poise/tls/tls.crt
  tls_key_file: /etc/poise/tls/tls.key
  {{- end }}
admin:
  host: "::" # both families; only IPv4 where a node has no IPv6
  port: {{ include "poise.adminPort" .role }}
  allowed_hosts: {{ include "poise.allowedHosts" . }}
auth:
  token_file: /etc/poise/auth/token
drain_timeout_s: {{ (index .root.Values .role).config.drain_timeout_s | default (get $drain .role) }}
logging:
  format: json
tracing:
  otlp_endpoint: {{ .root.Values.tracing.otlpEndpoint | quote }}
{{- end }}

{{- /* Short and long names of the service and its pods, and the user's own names. */}}
{{- define "poise.allowedHosts" -}}
{{- $name := include "poise.name" . -}}
{{- $long := printf "%s.%s" $name .root.Release.Namespace -}}
{{- $own := list $name $long (printf "%s.svc" $long) (printf "%s.svc.cluster.local" $long) -}}
{{- $hosts := list -}}
{{- range $own }}{{ $hosts = append $hosts (printf ".%s" .) }}{{ end -}}
{{- $given := dig "config" "admin" "allowed_hosts" list (index .root.Values .role) -}}
{{- concat $hosts $given | toJson -}}
{{- end }}

{{- define "poise.generationConfig" -}}
{{- $own := dict "model" (include "poise.modelPath" .) "wait_for_learner" true -}}
{{- if eq (include "poise.transport" .) "nccl" -}}{{- $_ := set $own "nccl" true -}}{{- end -}}
{{- if gt (int .Values.generation.gpus) 0 -}}
{{- $_ := set $own "vllm" (dict "tensor_parallel_size" (int .Values.generation.gpus)) -}}
{{- end -}}
{{- $common := include "poise.serviceConfig" (dict "root" . "role" "generation") | fromYaml -}}
{{- mergeOverwrite (deepCopy .Values.generation.config) $common $own | toYaml -}}
{{- end }}

{{/* How the learner pushes weights. */}}
{{- define "poise.transport" -}}
{{- dig "push" "transport" "grpc" .Values.learner.config -}}
{{- end }}

{{/* The estimator of the training job's algorithm; empty if it names none. */}}
{{- define "poise.estimator" -}}
{{- $algorithm := .Values.train.config.algorithm -}}
{{- if and .Values.train.enabled (kindIs "map" $algorithm) -}}
{{- if eq ($algorithm.kind | default "poise") "poise" -}}{{- $algorithm.estimator | default "" -}}{{- end -}}
{{- end -}}
{{- end }}

{{- define "poise.valueConfig" -}}
{{- $common := include "poise.serviceConfig" (dict "root" . "role" "value") | fromYaml -}}
{{- $own := dict "state_dir" "/state" -}}
{{- with include "poise.estimator" . }}{{ $_ := set $own "estimator" . }}{{ end -}}
{{- mergeOverwrite (deepCopy .Values.value.config) $common $own | toYaml -}}
{{- end }}

{{- define "poise.learnerConfig" -}}
{{- $own := dict "model" (include "poise.modelPath" .) "state_dir" "/state" "replica_token_file" "/etc/poise/auth/token" -}}
{{- $_ := set $own "replicas" (include "poise.generationAddresses" . | fromJsonArray) -}}
{{- if .Values.tls.enabled -}}{{- $_ := set $own "replica_ca_file" "/etc/poise/tls/ca.crt" -}}{{- end -}}
{{- if gt (int .Values.learner.gpusPerNode) 0 -}}{{- $_ := set $own "device" "cuda" -}}{{- end -}}
{{- $common := include "poise.serviceConfig" (dict "root" . "role" "learner") | fromYaml -}}
{{- mergeOverwrite (deepCopy .Values.learner.config) $common $own | toYaml -}}
{{- end }}

{{/* Addresses of the services, in the form of the SDK. */}}
{{- define "poise.endpoints" -}}
{{- $endpoints := dict "token_file" "/etc/poise/auth/token" "generation" (include "poise.generationAddresses" . | fromJsonArray) -}}
{{- $_ := set $endpoints "value" (include "poise.podAddress" (dict "root" . "role" "value" "index" 0)) -}}
{{- $_ := set $endpoints "learner" (include "poise.podAddress" (dict "root" . "role" "learner" "index" 0)) -}}
{{- if .Values.tls.enabled -}}{{- $_ := set $endpoints "ca_file" "/etc/poise/tls/ca.crt" -}}{{- end -}}
{{- toYaml $endpoints -}}
{{- end }}

{{- define "poise.trainConfig" -}}
{{- $own := dict "run_dir" "/runs/run" "endpoints" (include "poise.endpoints" . | fromYaml) "logging" (dict "format" "json") -}}
{{- $_ := set $own "tracing" (dict "otlp_endpoint" .Values.tracing.otlpEndpoint) -}}
{{- mergeOverwrite (dict "run_id" .Release.Name) (deepCopy .Values.train.config) $own | toYaml -}}
{{- end }}

{{- define "poise.config" -}}
{{- if eq .role "generation" }}{{ include "poise.generationConfig" .root }}
{{- else if eq .role "value" }}{{ include "poise.valueConfig" .root }}
{{- else if eq .role "learner" }}{{ include "poise.learnerConfig" .root }}
{{- else }}{{ include "poise.trainConfig" .root }}{{ end }}
{{- end }}
