{{/*
Pod templates, written once and used by both backends. `kuberay` leaves out what the operator adds itself:
the command of Ray containers.
*/}}

{{/* usage: include "moray.podMeta" (list $ "expert" $values) */}}
{{- define "moray.podMeta" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
labels:
  {{- include "moray.selector" (list $root (index . 1)) | nindent 2 }}
  app.kubernetes.io/part-of: moray
  app.kubernetes.io/instance: {{ $root.Release.Name }}
  {{- with $root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $values.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ toYaml $root.Values.config | sha256sum }}
  {{- with $values.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* What every pod says of itself, from its group's values. usage: include "moray.podCommon" (list $ "expert" $values) */}}
{{- define "moray.podCommon" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 $root.Values.security.runAsUser }}
  runAsGroup: {{ int64 $root.Values.security.runAsGroup }}
  seccompProfile:
    type: RuntimeDefault
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
{{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "moray.selector" (list $root (index . 1)) | nindent 8 }}
{{- end }}
{{- end -}}

{{/* usage: include "moray.mounts" (list $ $values $needsWeights) */}}
{{- define "moray.mounts" -}}
{{- $root := index . 0 -}}
- name: config
  mountPath: /etc/moray
  readOnly: true
- name: cache
  mountPath: /var/cache/moray
- name: tmp
  mountPath: /tmp
{{- if and (index . 2) (ne $root.Values.weights.type "none") }}
- name: weights
  mountPath: {{ $root.Values.weights.mountPath }}
  readOnly: true
{{- end }}
{{- with (index . 1).extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* usage: include "moray.volumes" (list $ $values $needsWeights) */}}
{{- define "moray.volumes" -}}
{{- $root := index . 0 -}}
- name: config
  configMap:
    name: {{ include "moray.fullname" $root }}-config
- name: cache
  emptyDir:
    sizeLimit: {{ $root.Values.cache.sizeLimit }}
- name: tmp
  emptyDir: {}
{{- if and (index . 2) (ne $root.Values.weights.type "none") }}
- name: weights
  {{- if eq $root.Values.weights.type "hostPath" }}
  hostPath:
    path: {{ $root.Values.weights.hostPath }}
    type: Directory
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "moray.claimName" $root }}
    readOnly: true
  {{- end }}
{{- end }}
{{- with (index . 1).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Ray's session folder and /dev/shm: in the head pod both containers see the same ones. */}}
{{- define "moray.rayMounts" -}}
- name: ray
  mountPath: /tmp/ray
- name: shm
  mountPath: /dev/shm
{{- end -}}

{{- define "moray.rayVolumes" -}}
- name: ray
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.ray.sharedMemorySize }}
{{- end -}}

{{/* Health of the Ray node in the pod, asked of its agent, which answers without a token. */}}
{{- define "moray.rayProbes" -}}
startupProbe:
  httpGet:
    path: /api/local_raylet_healthz
    port: agent
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .Values.ray.startupSeconds) 4) 5 }}
livenessProbe:
  httpGet:
    path: /api/local_raylet_healthz
    port: agent
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet:
    path: /api/local_raylet_healthz
    port: agent
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/* GPUs among limits, as Ray counts them. */}}
{{- define "moray.numGpus" -}}
{{- $count := "0" -}}
{{- range $name, $quantity := .limits -}}
{{- if hasSuffix "gpu" $name -}}{{- $count = $quantity -}}{{- end -}}
{{- end -}}
{{- $count -}}
{{- end -}}

{{/* Flags of `ray start` that head and workers share, as YAML for KubeRay's rayStartParams. */}}
{{- define "moray.rayStartParams" -}}
dashboard-agent-listen-port: {{ .Values.ray.agentPort | quote }}
disable-usage-stats: "true"
metrics-export-port: {{ .Values.ray.metricsPort | quote }}
object-store-memory: {{ int64 .Values.ray.objectStoreMemory | quote }}
{{- end -}}

{{/* The same for a shell. usage: include "moray.rayStartFlags" (list $ "expert") */}}
{{- define "moray.rayStartFlags" -}}
{{- range $flag, $value := fromYaml (include "moray.rayStartParams" (index . 0)) -}}
{{- if eq $value "true" }} --{{ $flag }}{{ else }} --{{ $flag }}={{ $value }}{{ end -}}
{{- end }} --node-ip-address="$MORAY_POD_IP" --labels=moray.io/group={{ index . 1 }} --block
{{- end -}}

{{/* Ports of a Ray container; KubeRay reads them by name. usage: include "moray.rayPorts" (list $ "head") */}}
{{- define "moray.rayPorts" -}}
{{- $ray := (index . 0).Values.ray -}}
{{- if eq (index . 1) "head" }}
- name: gcs-server
  containerPort: {{ $ray.gcsPort }}
  protocol: TCP
- name: dashboard
  containerPort: {{ $ray.dashboardPort }}
  protocol: TCP
{{- end }}
- name: agent
  containerPort: {{ $ray.agentPort }}
  protocol: TCP
- name: metrics
  containerPort: {{ $ray.metricsPort }}
  protocol: TCP
{{- end -}}

{{- define "moray.controllerPorts" -}}
- name: controller
  containerPort: {{ .Values.config.controller.port }}
  protocol: TCP
- name: ctl-metrics
  containerPort: {{ .Values.config.controller.metrics_port }}
  protocol: TCP
{{- end -}}

{{/* usage: include "moray.headPodSpec" (list $ $isNative $hasController) */}}
{{- define "moray.headPodSpec" -}}
{{- $root := index . 0 -}}
{{- $values := $root.Values.head -}}
{{- include "moray.podCommon" (list $root "head" $values) }}
serviceAccountName: {{ include "moray.serviceAccountName" $root }}
automountServiceAccountToken: {{ $root.Values.rbac.create }}
# The controller is a driver of the Ray node next door, which knows it by its process id.
shareProcessNamespace: true
containers:
  - name: ray-head
    image: {{ include "moray.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- if index . 1 }}
    command: [/bin/bash, -c]
    args:
      - >-
        exec ray start --head --port={{ $root.Values.ray.gcsPort }} --dashboard-host=0.0.0.0
        --dashboard-port={{ $root.Values.ray.dashboardPort }} --num-cpus=0
        {{- include "moray.rayStartFlags" (list $root "head") | trim | nindent 8 }}
    {{- end }}
    env:
      {{- include "moray.env" $root | nindent 6 }}
      {{- include "moray.authEnv" $root | nindent 6 }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      {{- include "moray.rayPorts" (list $root "head") | trim | nindent 6 }}
      {{- if not (index . 2) }}
      {{- include "moray.controllerPorts" $root | nindent 6 }}
      {{- end }}
    {{- include "moray.rayProbes" $root | nindent 4 }}
    lifecycle:
      preStop:
        exec:
          # Ray stays until the controller beside it has shut the cluster down and closed its port.
          command:
            - /bin/bash
            - -c
            - >-
              for _ in $(seq {{ sub (int $values.terminationGracePeriodSeconds) 35 }}); do
              (exec 3<>/dev/tcp/$MORAY_POD_IP/{{ $root.Values.config.controller.port }}) 2>/dev/null || exit 0;
              sleep 1; done
    securityContext:
      {{- include "moray.containerSecurity" $root | nindent 6 }}
    {{- include "moray.resources" $values.resources | nindent 4 }}
    volumeMounts:
      {{- include "moray.mounts" (list $root $values true) | nindent 6 }}
      {{- include "moray.rayMounts" $root | nindent 6 }}
  {{- if index . 2 }}
  {{- include "moray.controllerContainer" $root | nindent 2 }}
  {{- end }}
volumes:
  {{- include "moray.rayVolumes" $root | nindent 2 }}
  {{- include "moray.volumes" (list $root $values true) | nindent 2 }}
{{- end -}}

{{/* `moray up` beside the Ray head. It exits when the cluster fails, and the kubelet starts it again. */}}
{{- define "moray.controllerContainer" -}}
- name: controller
  image: {{ include "moray.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [/bin/bash, -c]
  args:
    - |-
      until (exec 3<>/dev/tcp/$MORAY_POD_IP/{{ .Values.ray.agentPort }}) 2>/dev/null; do sleep 1; done
      # A controller that is there already outlived a `moray up` that was killed: it is ended first.
      if (exec 3<>/dev/tcp/$MORAY_POD_IP/{{ .Values.config.controller.port }}) 2>/dev/null; then
        moray down --controller "$MORAY_POD_IP:{{ .Values.config.controller.port }}"
      fi
      exec moray up --config /etc/moray/config.yaml
  env:
    - name: RAY_ADDRESS
      value: 127.0.0.1:{{ .Values.ray.gcsPort }}
    {{- include "moray.env" . | nindent 4 }}
    {{- include "moray.authEnv" . | nindent 4 }}
    {{- with .Values.head.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    {{- include "moray.controllerPorts" . | nindent 4 }}
  readinessProbe:
    tcpSocket:
      port: controller
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 3
  securityContext:
    {{- include "moray.containerSecurity" . | nindent 4 }}
  {{- include "moray.resources" .Values.head.controllerResources | nindent 2 }}
  volumeMounts:
    {{- include "moray.mounts" (list . .Values.head true) | nindent 4 }}
    {{- include "moray.rayMounts" . | nindent 4 }}
{{- end -}}

{{/* usage: include "moray.workerPodSpec" (list $ "expert" $isNative) */}}
{{- define "moray.workerPodSpec" -}}
{{- $root := index . 0 -}}
{{- $group := index . 1 -}}
{{- $values := index $root.Values.groups $group -}}
{{- $head := include "moray.serviceHost" (list $root "head") -}}
{{- include "moray.podCommon" (list $root $group $values) }}
automountServiceAccountToken: false
containers:
  - name: ray-worker
    image: {{ include "moray.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- if index . 2 }}
    command: [/bin/bash, -c]
    args:
      - |-
        trap 'exit 143' TERM
        head="{{ $head }}"
        until (exec 3<>"/dev/tcp/$head/{{ $root.Values.ray.gcsPort }}") 2>/dev/null; do sleep 2; done
        exec ray start --address="$head:{{ $root.Values.ray.gcsPort }}" --num-gpus={{ include "moray.numGpus" $values.resources }} \
          {{ include "moray.rayStartFlags" (list $root $group) | trim }}
    {{- end }}
    env:
      {{- include "moray.env" $root | nindent 6 }}
      {{- include "moray.authEnv" $root | nindent 6 }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      {{- include "moray.rayPorts" (list $root $group) | trim | nindent 6 }}
    {{- include "moray.rayProbes" $root | nindent 4 }}
    {{- if ne $group "expert" }}
    lifecycle:
      preStop:
        exec:
          # Requests finish or go on elsewhere before Ray is told to stop; a controller that is away drains nobody.
          command:
            - /bin/bash
            - -c
            - >-
              moray drain "$MORAY_POD_IP" --controller "{{ $head }}:{{ $root.Values.config.controller.port }}"
              --deadline-s {{ sub (int $values.terminationGracePeriodSeconds) 15 }} || true
    {{- end }}
    securityContext:
      {{- include "moray.containerSecurity" $root | nindent 6 }}
    {{- include "moray.resources" $values.resources | nindent 4 }}
    volumeMounts:
      {{- include "moray.mounts" (list $root $values true) | nindent 6 }}
      {{- include "moray.rayMounts" $root | nindent 6 }}
volumes:
  {{- include "moray.rayVolumes" $root | nindent 2 }}
  {{- include "moray.volumes" (list $root $values true) | nindent 2 }}
{{- end -}}
