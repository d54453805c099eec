{{- define "fedgiva.selector" -}}
app.kubernetes.io/name: fedgiva
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: site
{{- end }}

{{- define "fedgiva.labels" -}}
{{ include "fedgiva.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
