{{/* Whether others than the pod itself reach the API: only one that asks who they are. Empty: no. */}}
{{- define "kvstore.apiOpen" -}}
{{- if and .Values.api.enabled (or .Values.api.tokensSecretName .Values.api.oidc.issuer) }}yes{{ end }}
{{- end }}

{{/* Whether a probe of the kubelet reaches it: the kubelet has no certificate to show. */}}
{{- define "kvstore.apiProbed" -}}
{{- if and (include "kvstore.apiOpen" .) (not .Values.api.tls.clientCA) }}yes{{ end }}
{{- end }}

{{- define "kvstore.apiScheme" -}}
{{ ternary "HTTPS" "HTTP" (ne .Values.api.tls.secretName "") }}
{{- end }}

{{- define "kvstore.apiEnv" -}}
{{- if .Values.api.enabled }}
{{- if include "kvstore.apiOpen" . }}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: KVSTORE_API__LISTEN, value: "{{ .Values.api.host }}:{{ .Values.api.port }}"}
{{- else }}
- {name: KVSTORE_API__LISTEN, value: "127.0.0.1:{{ .Values.api.port }}"}
{{- end }}
{{- if .Values.api.tokensSecretName }}
- {name: KVSTORE_API__TOKENS, value: /etc/kvstore-tokens/tokens.json}
{{- end }}
{{- if .Values.api.peerTokenSecretName }}
- {name: KVSTORE_API__PEER_TOKEN, value: /etc/kvstore-peers/token}
{{- end }}
{{- with .Values.api.oidc }}
{{- if .issuer }}
- {name: KVSTORE_API__OIDC_ISSUER, value: {{ .issuer | quote }}}
- {name: KVSTORE_API__OIDC_AUDIENCE, value: {{ required "api.oidc.audience is what the issuer's tokens name as theirs" .audience | quote }}}
{{- with .roleClaim }}
- {name: KVSTORE_API__OIDC_ROLE_CLAIM, value: {{ . | quote }}}
{{- end }}
{{- with .roles }}
- {name: KVSTORE_API__OIDC_ROLES, value: {{ . | quote }}}
{{- end }}
{{- with .tenantClaim }}
- {name: KVSTORE_API__OIDC_TENANT_CLAIM, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.api.tls.secretName }}
- {name: KVSTORE_API__TLS_CERTIFICATE, value: /etc/kvstore-tls/tls.crt}
- {name: KVSTORE_API__TLS_KEY, value: /etc/kvstore-tls/tls.key}
{{- end }}
{{- if .Values.api.tls.clientCA }}
{{- $_ := required "api.tls.clientCA wants api.tls.secretName" .Values.api.tls.secretName }}
- {name: KVSTORE_API__CLIENT_CA, value: /etc/kvstore-tls/ca.crt}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvstore.apiPorts" -}}
{{- if include "kvstore.apiOpen" . }}
ports:
  - {name: api, containerPort: {{ .Values.api.port }}}
{{- end }}
{{- end }}

{{- define "kvstore.apiMounts" -}}
{{- if .Values.api.enabled }}
{{- if .Values.api.tokensSecretName }}
- {name: tokens, mountPath: /etc/kvstore-tokens, readOnly: true}
{{- end }}
{{- if .Values.api.peerTokenSecretName }}
- {name: peers, mountPath: /etc/kvstore-peers, readOnly: true}
{{- end }}
{{- if .Values.api.tls.secretName }}
- {name: tls, mountPath: /etc/kvstore-tls, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvstore.apiVolumes" -}}
{{- if .Values.api.enabled }}
{{- with .Values.api.tokensSecretName }}
- name: tokens
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.api.peerTokenSecretName }}
- name: peers
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.api.tls.secretName }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}
