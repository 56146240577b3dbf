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

{{/* What every process of the project gets: where things are, and who shares a node. */}}
{{- define "kvstore.env" -}}
- {name: KVSTORE_CONFIG, value: /etc/kvstore/node.toml}
- {name: KVSTORE_NODE__SOCKET, value: /run/kvstore/node.sock}
- {name: KVSTORE_NODE__DIRECTORY, value: /var/lib/kvstore}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
{{- if .Values.encryption.keysSecretName }}
- {name: KVSTORE_ENCRYPTION__KEY_FILE, value: /etc/kvstore-encryption/keys}
{{- end }}
{{- if .Values.tenants.bookSecretName }}
- {name: KVSTORE_TENANTS__BOOK, value: /etc/kvstore-tenants/tenants.json}
{{- end }}
{{- if .Values.region.enabled }}
- {name: KVSTORE_REGION__NAME, value: {{ required "region.name is this region's name in the topology" .Values.region.name }}}
- {name: KVSTORE_REGION__TOPOLOGY, value: /etc/kvstore/regions.toml}
{{- end }}
{{- end }}

{{- define "kvstore.envFrom" -}}
{{- with .Values.secretName }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{- define "kvstore.mounts" -}}
- {name: config, mountPath: /etc/kvstore, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.encryption.keysSecretName }}
- {name: encryption, mountPath: /etc/kvstore-encryption, readOnly: true}
{{- end }}
{{- if .Values.tenants.bookSecretName }}
- {name: tenants, mountPath: /etc/kvstore-tenants, readOnly: true}
{{- end }}
{{- end }}

{{- define "kvstore.volumes" -}}
- name: config
  configMap: {name: {{ .Release.Name }}-config}
- name: tmp
  emptyDir: {}
{{- with .Values.encryption.keysSecretName }}
- name: encryption
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.tenants.bookSecretName }}
- name: tenants
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* The machine's part of a node: for the node itself and for who speaks to it. */}}
{{- define "kvstore.nodeMounts" -}}
- {name: run, mountPath: /run/kvstore}
- {name: data, mountPath: /var/lib/kvstore}
{{- end }}

{{- define "kvstore.nodeVolumes" -}}
- name: run
  hostPath: {path: {{ .Values.node.socketPath }}, type: DirectoryOrCreate}
- name: data
  hostPath: {path: {{ .Values.node.dataPath }}, type: DirectoryOrCreate}
{{- end }}
