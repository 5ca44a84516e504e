{{- define "croft.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* labels of COMPONENT: (list $ "node") */ -}}
{{- define "croft.labels" -}}
{{- $top := index . 0 -}}
{{ include "croft.selector" . }}
{{ include "croft.common" $top }}
{{- end }}

{{- define "croft.common" -}}
app.kubernetes.io/part-of: croft
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "croft.selector" -}}
app.kubernetes.io/name: croft
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "croft.snapshots" -}}
{{- if eq (toString .Values.snapshots) "auto" -}}
{{- if .Capabilities.APIVersions.Has "snapshot.storage.k8s.io/v1" }}true{{ end -}}
{{- else if .Values.snapshots }}true{{ end -}}
{{- end }}

{{- /* The host's directories that pools are in, once each: {"dirs": [{"name", "path", "type"}]}. */ -}}
{{- define "croft.parents" -}}
{{- $dirs := list -}}
{{- $seen := dict -}}
{{- $names := dict -}}
{{- $paths := dict -}}
{{- range .Values.pools -}}
{{- if hasKey $names .name }}{{ fail (printf "pools: two are called %q" .name) }}{{ end -}}
{{- if hasKey $paths .path }}{{ fail (printf "pools: two have the path %s" .path) }}{{ end -}}
{{- $_ := set $names .name true -}}
{{- $_ := set $paths .path true -}}
{{- $parent := dir .path -}}
{{- $type := .hostPathType | default "DirectoryOrCreate" -}}
{{- if hasKey $seen $parent -}}
{{- if ne (get $seen $parent) $type }}{{ fail (printf "pools: %s has two hostPathTypes" $parent) }}{{ end -}}
{{- else -}}
{{- $name := ternary "pools" (printf "pools-%d" (len $dirs)) (empty $dirs) -}}
{{- $dirs = append $dirs (dict "name" $name "path" $parent "type" $type) -}}
{{- $_ := set $seen $parent $type -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "dirs" $dirs) -}}
{{- end }}

{{- define "croft.capabilitiesNone" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
