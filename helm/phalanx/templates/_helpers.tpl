{{- define "phalanx.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-phalanx" .Release.Name) (contains "phalanx" .Release.Name) -}}
{{- $name | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{- define "phalanx.labels" -}}
app.kubernetes.io/name: phalanx
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Of the Pods of one part: (list . "server") */}}
{{- define "phalanx.selector" -}}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* Whatever belongs to the Ray cluster, the agent included. Not by app.kubernetes.io/name: that is KubeRay's. */}}
{{- define "phalanx.clusterSelector" -}}
matchLabels: {app.kubernetes.io/instance: {{ .Release.Name }}}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [agent, ray-head, ray-worker]}
{{- end }}

{{- define "phalanx.image" -}}
{{- $image := index (index . 0).Values.images (index . 1) -}}
image: {{ printf "%s:%s" $image.repository (default (index . 0).Chart.AppVersion $image.tag) | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end }}

{{- define "phalanx.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "phalanx.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The restricted Pod Security Standard: of a Pod, and of a container. 10001 is the user of both images. */}}
{{- define "phalanx.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "phalanx.restricted" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "phalanx.secretName" -}}
{{- $kind := index . 1 -}}
{{- $values := (index . 0).Values -}}
{{- $given := dict "admin" $values.tokens.adminSecret "cluster" $values.tokens.clusterSecret "ray" $values.ray.tokenSecret -}}
{{- if and (eq $kind "cluster") (not $values.controlPlane.enabled) -}}
{{- $_ := required "tokens.clusterSecret is needed where controlPlane.enabled is false" $values.tokens.clusterSecret -}}
{{- end -}}
{{- if and (eq $kind "ray") (not $values.ray.enabled) -}}
{{- $_ := required "ray.tokenSecret is needed where ray.enabled is false" $values.ray.tokenSecret -}}
{{- end -}}
{{- default (printf "%s-%s-token" (include "phalanx.fullname" (index . 0)) $kind) (get $given $kind) -}}
{{- end }}

{{- /* A token as `phalanx new-token` makes one: a UUIDv7, and 43 letters and digits, which is 256 bits. */}}
{{- define "phalanx.newToken" -}}
{{- $random := uuidv4 | replace "-" "" -}}
{{- $id := printf "%012x7%s8%s" (mul (now | unixEpoch | int64) 1000) (substr 13 16 $random) (substr 17 32 $random) -}}
{{- printf "phx_%s_%s" $id (randAlphaNum 43) -}}
{{- end }}

{{- /* What server, scheduler and migration have in common. */}}
{{- define "phalanx.controlPlaneEnv" -}}
- name: PHALANX_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.database.existingSecret }}, key: PHALANX_DATABASE_URL}}
- {name: PHALANX_DATA_DIR, value: /var/lib/phalanx}
- {name: PHALANX_LOG_FORMAT, value: json}
{{- with .Values.storage.url }}
- name: PHALANX_STORAGE_URL
  value: {{ . | quote }}
{{- end }}
{{- if .Values.controlPlane.policy }}
- {name: PHALANX_POLICY_FILE, value: /etc/phalanx/policy.json}
{{- end }}
{{- range $name, $value := .Values.controlPlane.settings }}
- name: PHALANX_{{ upper $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- with .Values.controlPlane.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "phalanx.controlPlaneMounts" -}}
- {name: data, mountPath: /var/lib/phalanx}
- {name: tmp, mountPath: /tmp}
{{- if .Values.controlPlane.policy }}
- {name: policy, mountPath: /etc/phalanx, readOnly: true}
{{- end }}
{{- end }}

{{- define "phalanx.controlPlaneVolumes" -}}
- name: data
  {{- if .Values.storage.url }}
  emptyDir: {}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-storage" (include "phalanx.fullname" .)) .Values.storage.existingClaim }}
  {{- end }}
- {name: tmp, emptyDir: {}}
{{- if .Values.controlPlane.policy }}
- name: policy
  configMap: {name: {{ include "phalanx.fullname" . }}-policy}
{{- end }}
{{- end }}

{{- define "phalanx.rayCluster" -}}
{{ include "phalanx.fullname" . }}-ray
{{- end }}

{{- define "phalanx.rayAddress" -}}
{{- if .Values.ray.enabled -}}
{{ default (printf "%s-head-svc:6379" (include "phalanx.rayCluster" .)) .Values.agent.rayAddress }}
{{- else -}}
{{ required "agent.rayAddress is needed where ray.enabled is false (or set agent.enabled to false)" .Values.agent.rayAddress }}
{{- end -}}
{{- end }}

{{- define "phalanx.serverUrl" -}}
{{- if .Values.controlPlane.enabled -}}
{{ default (printf "http://%s-server:%v" (include "phalanx.fullname" .) .Values.server.service.port) .Values.agent.serverUrl }}
{{- else -}}
{{ required "agent.serverUrl is needed where controlPlane.enabled is false" .Values.agent.serverUrl }}
{{- end -}}
{{- end }}

{{- /* Ray's own environment, the same in every process of the cluster. */}}
{{- define "phalanx.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /etc/ray/auth_token}
- {name: RAY_TMPDIR, value: /var/lib/ray} # of mode 0700 in the image: Ray makes its sockets and logs 0777
- {name: RAY_memory_monitor_refresh_ms, value: "0"} # it kills the small runner and not its hungry child
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end }}

{{- define "phalanx.rayTokenVolume" -}}
- name: ray-token
  secret:
    secretName: {{ include "phalanx.secretName" (list . "ray") }}
    defaultMode: 0440
{{- end }}

{{- define "phalanx.rayProbe" -}}
httpGet: {path: /api/healthz, port: 52365}
periodSeconds: 10
timeoutSeconds: 5
{{- end }}
