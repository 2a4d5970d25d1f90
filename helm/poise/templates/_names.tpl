{{/* Names, labels and addresses. Each helper takes the root context, or a dict of root and role. */}}

{{- define "poise.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* The name of a role: dict "root" $ "role" "value". */}}
{{- define "poise.name" -}}
{{ include "poise.fullname" .root }}-{{ .role }}
{{- end }}

{{- define "poise.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{/* Labels of pods. They do not contain the chart's version, because a changed label restarts every pod. */}}
{{- define "poise.podLabels" -}}
{{ include "poise.selector" . }}
app.kubernetes.io/part-of: {{ .root.Chart.Name }}
{{- end }}

{{- define "poise.labels" -}}
{{ include "poise.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ .root.Chart.Name }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Registry, path and name of a role's image, without tag and digest. The registry may have a port. */}}
{{- define "poise.repository" -}}
{{- regexReplaceAll "(:[^:/@]+)?(@.*)?$" (printf "%s%s" .root.Values.images.prefix (index .root.Values.images .role)) "" -}}
{{- end }}

{{/* An image's own tag or digest overrides the common tag. */}}
{{- define "poise.image" -}}
{{- $image := printf "%s%s" .root.Values.images.prefix (index .root.Values.images .role) -}}
{{- $digest := get .root.Values.images.digests .role -}}
{{- if $digest }}{{ include "poise.repository" . }}@{{ $digest }}
{{- else if ne $image (include "poise.repository" .) }}{{ $image }}
{{- else }}{{ $image }}:{{ .root.Values.images.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "poise.grpcPort" -}}
{{- get (dict "generation" 50051 "value" 50052 "learner" 50053) . -}}
{{- end }}

{{- define "poise.adminPort" -}}
{{- get (dict "generation" 8051 "value" 8052 "learner" 8053) . -}}
{{- end }}

{{/* The address of one pod of a role: dict "root" $ "role" "learner" "index" 0. */}}
{{- define "poise.podAddress" -}}
{{- $name := include "poise.name" . -}}
{{ $name }}-{{ .index }}.{{ $name }}.{{ .root.Release.Namespace }}.svc:{{ include "poise.grpcPort" .role }}
{{- end }}

{{/* The claim of a role's volume: the user's, or the one that the chart creates. */}}
{{- define "poise.claim" -}}
{{ (index .root.Values .role).storage.claim | default (include "poise.name" .) }}
{{- end }}

{{- define "poise.authSecret" -}}
{{ .Values.auth.existingSecret | default (printf "%s-auth" (include "poise.fullname" .)) }}
{{- end }}

{{- define "poise.tlsSecret" -}}
{{ .Values.tls.existingSecret | default (printf "%s-tls" (include "poise.fullname" .)) }}
{{- end }}

{{- define "poise.queueSecret" -}}
{{- if .Values.valkey.enabled }}{{ include "poise.fullname" . }}-valkey{{ else }}{{ .Values.valkey.externalSecret }}{{ end }}
{{- end }}

{{/* Token and password of the chart: those of the installed release, or new ones. They are the same throughout a rendering. */}}
{{- define "poise.madeSecrets" -}}
{{- if not (hasKey .Values "madeSecrets") -}}
{{- $auth := (lookup "v1" "Secret" .Release.Namespace (include "poise.authSecret" .)).data | default dict -}}
{{- $queue := (lookup "v1" "Secret" .Release.Namespace (include "poise.queueSecret" .)).data | default dict -}}
{{- $token := get $auth "token" | b64dec | default (randAlphaNum 48) -}}
{{- $password := get $queue "password" | b64dec | default (randAlphaNum 48) -}}
{{- $_ := set .Values "madeSecrets" (dict "token" $token "password" $password) -}}
{{- end -}}
{{- toJson .Values.madeSecrets -}}
{{- end }}

{{/* The model's folder inside the pods. */}}
{{- define "poise.modelPath" -}}
{{- if .Values.model.builtin }}/models/{{ .Values.model.builtin }}
{{- else if hasPrefix "/" .Values.model.path }}{{ .Values.model.path }}
{{- else }}/models/{{ .Values.model.path }}{{ end }}
{{- end }}

{{- define "poise.hasModelVolume" -}}
{{- if or .Values.model.claim .Values.model.download.repository .Values.model.builtin }}yes{{ end }}
{{- end }}

{{/* The replicas, by the name of their service, so that later ones (autoscaler, kubectl scale) are found too. */}}
{{- define "poise.generationAddresses" -}}
{{- $name := include "poise.name" (dict "root" . "role" "generation") -}}
{{- list (printf "dns:///%s.%s.svc:%s" $name .Release.Namespace (include "poise.grpcPort" "generation")) | toJson -}}
{{- end }}
