{{/* The spec of a RayCluster, also inside a RayJob. usage: include "moray.rayClusterSpec" (list $ $hasController) */}}
{{- define "moray.rayClusterSpec" -}}
{{- $root := index . 0 -}}
rayVersion: {{ $root.Values.ray.version | quote }}
enableInTreeAutoscaling: false
authOptions:
  mode: {{ $root.Values.auth.mode }}
  {{- if eq $root.Values.auth.mode "token" }}
  secretName: {{ include "moray.secretName" $root }}
  {{- end }}
headGroupSpec:
  labels:
    moray.io/group: head
  rayStartParams:
    port: {{ $root.Values.ray.gcsPort | quote }}
    dashboard-host: 0.0.0.0
    dashboard-port: {{ $root.Values.ray.dashboardPort | quote }}
    num-cpus: "0"
    {{- include "moray.rayStartParams" $root | nindent 4 }}
  template:
    metadata:
      {{- include "moray.podMeta" (list $root "head" $root.Values.head) | nindent 6 }}
    spec:
      {{- include "moray.headPodSpec" (list $root false (index . 1)) | nindent 6 }}
workerGroupSpecs:
  {{- range $group, $values := $root.Values.groups }}
  {{- if gt (int $values.pods) 0 }}
  - groupName: {{ $group }}
    replicas: {{ $values.pods }}
    minReplicas: {{ $values.pods }}
    maxReplicas: {{ $values.pods }}
    labels:
      moray.io/group: {{ $group }}
    rayStartParams:
      {{- include "moray.rayStartParams" $root | nindent 6 }}
    template:
      metadata:
        {{- include "moray.podMeta" (list $root $group $values) | nindent 8 }}
      spec:
        {{- include "moray.workerPodSpec" (list $root $group false) | nindent 8 }}
  {{- end }}
  {{- end }}
{{- end -}}
