{{- /* The Pod of a worker group. With own users: root, and the capabilities that the node runner uses, each for this:
CHOWN          directories, code and output pipes become the tenant's
DAC_OVERRIDE   the runner fills and clears directories of mode 0700 that belong to a tenant
FOWNER         ... and those among them that a tenant made sticky
SETUID SETGID  a rank becomes its tenant's user before it runs anything of theirs
KILL           stopping ranks
SYS_PTRACE     finding ranks whose guardian died, by their environment in /proc
tests/deploy/test_capabilities.py runs that code with these, and with each of them taken away. */}}
{{- define "phalanx.workerSecurity" -}}
{{- if .Values.ray.ownUsers -}}
runAsUser: 0
runAsGroup: 0
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  add: [CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, SYS_PTRACE]
{{- else -}}
{{- include "phalanx.restricted" . }}
{{- end -}}
{{- end }}

{{- define "phalanx.workerTemplate" -}}
{{- $root := index . 0 }}
{{- $group := index . 1 }}
metadata:
  labels: {{- include "phalanx.selector" (list $root "ray-worker") | nindent 4 }}
spec:
  serviceAccountName: {{ include "phalanx.fullname" $root }}-cluster
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 60
  securityContext:
    {{- if $root.Values.ray.ownUsers }}
    seccompProfile: {type: RuntimeDefault}
    {{- else }}
    {{- include "phalanx.restrictedPod" $root | nindent 4 }}
    {{- end }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- include "phalanx.pullSecrets" $root | nindent 2 }}
  {{- include "phalanx.placement" $group | nindent 2 }}
  {{- if $root.Values.ray.ownUsers }}
  initContainers:
    - name: close-directories # as Kubernetes makes them, any tenant could rename what others have there
      {{- include "phalanx.image" (list $root "worker") | nindent 6 }}
      command: [/bin/sh, -ec, "chmod 0755 /var/lib/phalanx; chmod 1777 /dev/shm"]
      resources:
        requests: {cpu: 10m, memory: 16Mi}
        limits: {memory: 64Mi}
      securityContext:
        runAsUser: 0
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: node-data, mountPath: /var/lib/phalanx}
        - {name: shared-memory, mountPath: /dev/shm}
  {{- end }}
  containers:
    - name: ray-worker
      {{- include "phalanx.image" (list $root "worker") | nindent 6 }}
      env:
        {{- include "phalanx.rayEnv" $root | nindent 8 }}
        {{- with $root.Values.ray.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      readinessProbe:
        {{- include "phalanx.rayProbe" $root | nindent 8 }}
      livenessProbe:
        {{- include "phalanx.rayProbe" $root | nindent 8 }}
        initialDelaySeconds: 60
        failureThreshold: 12
      resources:
        {{- range list "requests" "limits" }}
        {{ . }}:
          cpu: {{ $group.cpus | quote }}
          memory: {{ $group.memory }}
          {{- with $group.gpus }}
          {{ default "nvidia.com/gpu" $group.gpuResource }}: {{ . | quote }}
          {{- end }}
        {{- end }}
      securityContext: {{- include "phalanx.workerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: node-data, mountPath: /var/lib/phalanx}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: ray-token, mountPath: /etc/ray, readOnly: true}
        {{- if not $root.Values.checkpoints.url }}
        - name: checkpoints
          mountPath: {{ $root.Values.checkpoints.path }}
        {{- end }}
  volumes:
    - name: node-data
      emptyDir: {sizeLimit: {{ $root.Values.nodeData.size }}}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ default "2Gi" $group.sharedMemory }}}
    {{- include "phalanx.rayTokenVolume" $root | nindent 4 }}
    {{- if not $root.Values.checkpoints.url }}
    - name: checkpoints
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-checkpoints" (include "phalanx.fullname" $root)) $root.Values.checkpoints.existingClaim }}
    {{- end }}
{{- end }}
