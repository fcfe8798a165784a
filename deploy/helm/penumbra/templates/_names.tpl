{{- define "penumbra.labels" -}}
{app.kubernetes.io/name: penumbra, app.kubernetes.io/instance: {{ .Release.Name }}}
{{- end -}}
{{- define "penumbra.claim" -}}
{{ .Values.store.claim.name | default (printf "%s-store" .Release.Name) }}
{{- end -}}
{{- define "penumbra.scheme" -}}
{{ if .Values.tls.secret }}, scheme: HTTPS{{ end }}
{{- end -}}
