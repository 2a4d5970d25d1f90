{{/* Parts shared by all pods of the release. All take dict "root" $ "role" "…". */}}

{{- define "poise.podMetadata" -}}
labels:
  {{- include "poise.podLabels" . | nindent 2 }}
  {{- with .root.Values.pods.labels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  {{- if ne .role "valkey" }}
  checksum/config: {{ include "poise.config" . | sha256sum }}
  {{- end }}
  {{- /* A new secret of the chart restarts the pods that use it. */}}
  {{- $made := include "poise.madeSecrets" .root | fromJson }}
  {{- if and (ne .role "valkey") (not .root.Values.auth.existingSecret) }}
  checksum/token: {{ $made.token | sha256sum }}
  {{- end }}
  {{- if and (has .role (list "value" "valkey")) .root.Values.valkey.enabled }}
  checksum/queue: {{ $made.password | sha256sum }}
  {{- end }}
  kubectl.kubernetes.io/default-container: {{ .role }}
  {{- with .root.Values.pods.annotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* User and permissions of the pod. */}}
{{- define "poise.podIdentity" -}}
serviceAccountName: {{ include "poise.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.pods.userId }}
  runAsGroup: {{ .root.Values.pods.userId }}
  fsGroup: {{ .root.Values.pods.userId }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* User, permissions and scheduling of the pod. The pod of `helm test` is scheduled like the loop. */}}
{{- define "poise.podSpec" -}}
{{- include "poise.podIdentity" . }}
{{- $own := index .root.Values (eq .role "test" | ternary "train" .role) }}
{{- with $own.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
tolerations: {{- include "poise.tolerations" (dict "root" .root "own" $own.tolerations) | nindent 2 }}
{{- with $own.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $own.spreadOver }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "poise.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{/* The user's tolerations, and the time until pods of a lost node are evicted. Kubernetes' default is 300 s. */}}
{{- define "poise.tolerations" -}}
{{- $all := .own -}}
{{- range $key := list "node.kubernetes.io/not-ready" "node.kubernetes.io/unreachable" -}}
{{- $isNamed := false -}}
{{- range $.own }}{{ if eq (.key | default "") $key }}{{ $isNamed = true }}{{ end }}{{ end -}}
{{- if not $isNamed -}}
{{- $all = append $all (dict "key" $key "operator" "Exists" "effect" "NoExecute" "tolerationSeconds" (int ($.root.Values.pods.lostNodeSeconds | default 60))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{- define "poise.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Bytes of a Kubernetes quantity, such as 20Gi. */}}
{{- define "poise.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- mulf $number (get $units (trimPrefix $number .)) | int64 -}}
{{- end }}

{{/* Requests and limits with GPUs: dict "resources" … "gpus" n, and "modelSize" if the pod's own volume holds a model. */}}
{{- define "poise.resources" -}}
{{- $gpus := dict -}}
{{- if gt (int .gpus) 0 -}}{{- $gpus = dict "limits" (dict "nvidia.com/gpu" (toString .gpus)) "requests" (dict "nvidia.com/gpu" (toString .gpus)) -}}{{- end -}}
{{- /* Limit of 8Gi for /tmp, 2Gi for logs, and a downloaded model. A pod beyond it is evicted. */}}
{{- $mebibytes := add 10240 (div (include "poise.bytes" (.modelSize | default "0")) 1048576) -}}
{{- $storage := dict "requests" (dict "ephemeral-storage" "1Gi") "limits" (dict "ephemeral-storage" (printf "%dMi" $mebibytes)) -}}
resources: {{- mergeOverwrite $storage (deepCopy .resources) $gpus | toYaml | nindent 2 }}
{{- end }}

{{- define "poise.commonMounts" -}}
- {name: config, mountPath: /etc/poise/config, readOnly: true}
- {name: auth, mountPath: /etc/poise/auth, readOnly: true}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/poise/tls, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "poise.commonVolumes" -}}
- name: config
  configMap: {name: {{ include "poise.name" . }}}
- name: auth
  secret: {secretName: {{ include "poise.authSecret" .root }}, defaultMode: 0440, items: [{key: token, path: token}]}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "poise.tlsSecret" .root }}}
{{- end }}
- name: tmp
  emptyDir: {sizeLimit: 8Gi}
{{- end }}

{{/* Probes of services. Readiness uses gRPC, as callers do; with TLS it uses HTTP, because a kubelet's gRPC probe has no TLS. */}}
{{- define "poise.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 2
  failureThreshold: 900
readinessProbe:
  {{- if .root.Values.tls.enabled }}
  httpGet: {path: /readyz, port: admin}
  {{- else }}
  grpc: {port: {{ include "poise.grpcPort" .role }}, service: poise.v1.{{ title .role }}Service}
  {{- end }}
  periodSeconds: 2
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{- define "poise.ports" -}}
ports:
  - {name: grpc, containerPort: {{ include "poise.grpcPort" .role }}, protocol: TCP}
  - {name: admin, containerPort: {{ include "poise.adminPort" .role }}, protocol: TCP}
{{- end }}

{{/* Time to drain and then to write the state. */}}
{{- define "poise.grace" -}}
terminationGracePeriodSeconds: {{ add (include "poise.drainSeconds" .) 30 }}
{{- end }}

{{/* Seconds that a service has to finish accepted work, from its own settings. */}}
{{- define "poise.drainSeconds" -}}
{{- $config := include "poise.config" . | fromYaml -}}
{{- ceil $config.drain_timeout_s -}}
{{- end }}

{{/* The model, mounted or downloaded by an init container: dict "root" $ "role" … */}}
{{- define "poise.modelMount" -}}
{{- if include "poise.hasModelVolume" .root }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* Size of the pod's own volume with the model; empty without one. */}}
{{- define "poise.ownModelSize" -}}
{{- if and (not .root.Values.model.claim) (include "poise.hasModelVolume" .root) }}{{ .root.Values.model.download.size }}{{ end }}
{{- end }}

{{- define "poise.modelVolume" -}}
{{- if .root.Values.model.claim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .root.Values.model.claim }}, readOnly: true}
{{- else if include "poise.ownModelSize" . }}
- name: model
  emptyDir: {sizeLimit: {{ include "poise.ownModelSize" . }}}
{{- end }}
{{- end }}

{{- define "poise.modelInit" -}}
{{- $model := .root.Values.model -}}
{{- if or $model.download.repository $model.builtin }}
initContainers:
  - name: model
    image: {{ include "poise.image" . }}
    imagePullPolicy: {{ .root.Values.images.pullPolicy }}
    {{- if $model.builtin }}
    command: [poise, models, {{ $model.builtin }}]
    {{- else }}
    command: [hf, download, {{ $model.download.repository | quote }}, --revision, {{ $model.download.revision | quote }}, --local-dir, {{ include "poise.modelPath" .root }}]
    {{- end }}
    env:
      - {name: HOME, value: /tmp}
      - {name: POISE_CACHE, value: /models}
      {{- with $model.download.tokenSecret }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
      {{- end }}
    {{- include "poise.resources" (dict "resources" (dict "requests" (dict "cpu" "1" "memory" "2Gi") "limits" (dict "memory" "4Gi")) "gpus" 0 "modelSize" (include "poise.ownModelSize" .)) | nindent 4 }}
    {{- include "poise.containerSecurity" . | nindent 4 }}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
