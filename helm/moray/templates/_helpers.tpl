{{/* Names, labels and the small pieces that both backends share. Pods are in _pods.tpl. */}}

{{- define "moray.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Prefix of every object name; at most 40 characters, so that every suffix fits into 63. */}}
{{- define "moray.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := include "moray.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "moray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: moray
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
What selectors match. The keys are Moray's own: KubeRay's head Service selects pods by app.kubernetes.io/name,
which therefore must stay KubeRay's in the pods that it makes.
usage: include "moray.selector" (list $ "expert")
*/}}
{{- define "moray.selector" -}}
{{ include "moray.clusterSelector" (index . 0) }}
moray.io/group: {{ index . 1 }}
{{- end -}}

{{- define "moray.clusterSelector" -}}
moray.io/cluster: {{ include "moray.fullname" . }}
{{- end -}}

{{- define "moray.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "moray.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "moray.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "moray.secretName" -}}
{{- default (printf "%s-ray-token" (include "moray.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "moray.claimName" -}}
{{- if eq .Values.weights.type "pvc" -}}
{{- printf "%s-weights" (include "moray.fullname" .) -}}
{{- else -}}
{{- .Values.weights.claimName -}}
{{- end -}}
{{- end -}}

{{/*
Shell for the address of a Service: the variable that the kubelet sets, which needs no cluster DNS, else its name.
usage: include "moray.serviceHost" (list $ "head")
*/}}
{{- define "moray.serviceHost" -}}
{{- $root := index . 0 -}}
{{- $service := printf "%s-%s" (include "moray.fullname" $root) (index . 1) -}}
${ {{- $service | upper | replace "-" "_" -}} _SERVICE_HOST:-{{ $service }}.{{ $root.Release.Namespace }}.svc}
{{- end -}}

{{/* Ray refuses to guess about tokens only when both variables say what holds, on every node and client. */}}
{{- define "moray.authEnv" -}}
- name: RAY_AUTH_MODE
  value: {{ .Values.auth.mode }}
{{- if eq .Values.auth.mode "token" }}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "moray.secretName" . }}
      key: auth_token
{{- end }}
{{- end -}}

{{/* Environment of every container. USER stands in for a passwd entry that a base image may lack. */}}
{{- define "moray.env" -}}
- name: MORAY_CACHE_DIR
  value: /var/cache/moray
- name: HOME
  value: /var/cache/moray
- name: USER
  value: moray
- name: MORAY_POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: MORAY_POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- end -}}

{{- define "moray.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "moray.resources" -}}
{{- if or .requests .limits -}}
resources:
{{- with .requests }}
  requests:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- with .limits }}
  limits:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* apiVersion of PodDisruptionBudget: policy/v1 came with Kubernetes 1.21. */}}
{{- define "moray.policyVersion" -}}
{{- if and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
policy/v1
{{- else -}}
policy/v1beta1
{{- end -}}
{{- end -}}

{{/* Values that are fine one by one and wrong together. */}}
{{- define "moray.check" -}}
{{- $config := .Values.config -}}
{{- range $group := keys .Values.groups | sortAlpha -}}
{{- $workers := index $config $group -}}
{{- $host := dig "moray.io/group" "" $workers.node_selector -}}
{{- if gt (int $workers.replicas) 0 -}}
{{- if not (hasKey $.Values.groups $host) -}}
{{- fail (printf "config.%s.node_selector must hold moray.io/group: one of the groups, usually %s; got %q" $group $group $host) -}}
{{- end -}}
{{- if eq (int (index $.Values.groups $host).pods) 0 -}}
{{- fail (printf "config.%s.replicas is %d, but groups.%s.pods is 0: no pod would host them" $group (int $workers.replicas) $host) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $phase := list "prefill" "decode" -}}
{{- if and (eq (int (index $config $phase).replicas) 0) (eq (int $config.both.replicas) 0) -}}
{{- fail (printf "config.%s.replicas is 0: set it or config.both.replicas to at least 1, or nothing can %s" $phase $phase) -}}
{{- end -}}
{{- end -}}
{{- $leaving := add (int .Values.router.preStopSeconds) (int (ceil $config.router.drain_s)) -}}
{{- if lt (int .Values.router.terminationGracePeriodSeconds) (int (add $leaving 5)) -}}
{{- fail (printf "router.terminationGracePeriodSeconds must be at least %d: router.preStopSeconds + config.router.drain_s + 5" (add $leaving 5)) -}}
{{- end -}}
{{- range $group := list "prefill" "decode" "both" -}}
{{- $least := add (int (ceil (index $config $group).drain_s)) 15 -}}
{{- if lt (int (index $.Values.groups $group).terminationGracePeriodSeconds) (int $least) -}}
{{- fail (printf "groups.%s.terminationGracePeriodSeconds must be at least %d: config.%s.drain_s + 15" $group $least $group) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.weights.type "existingClaim") (not .Values.weights.claimName) -}}
{{- fail "weights.type is existingClaim: weights.claimName must name the claim" -}}
{{- end -}}
{{- if and (eq .Values.weights.type "hostPath") (not .Values.weights.hostPath) -}}
{{- fail "weights.type is hostPath: weights.hostPath must name the directory" -}}
{{- end -}}
{{- if and (hasPrefix "/" $config.model) (eq .Values.weights.type "none") -}}
{{- fail (printf "config.model is the path %s, but weights.type is none: no volume holds it" $config.model) -}}
{{- end -}}
{{- end -}}
