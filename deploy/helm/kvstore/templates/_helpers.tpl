{{- define "kvstore.labels" -}}
app.kubernetes.io/name: kvstore
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "kvstore.selector" -}}
app.kubernetes.io/name: kvstore
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvstore.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "kvstore.podSecurity" -}}
runAsNonRoot: true
{{ toYaml .Values.securityContext }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvstore.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "kvstore.env" -}}
- {name: KVSTORE_CONFIG, value: /etc/kvstore/node.toml}
- {name: KVSTORE_NODE__SOCKET, value: /run/kvstore/node.sock}
- {name: KVSTORE_NODE__DIRECTORY, value: /var/lib/kvstore}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
{{- end }}

{{- define "kvstore.envFrom" -}}
{{- with .Values.secretName }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}
