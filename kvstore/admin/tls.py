"""TLS of the admin API: what it listens with, and what its clients show and believe."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from kvstore.config.schema import ApiSection
from kvstore.tls import believe, show


def listening(api: ApiSection) -> dict[str, Any]:
    """uvicorn's settings. Raises ConfigError naming the file that cannot be used."""
    if api.tls_certificate is None or api.tls_key is None:
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    show(context, "api.tls_certificate", api.tls_certificate, api.tls_key)
    options: dict[str, Any] = {"ssl_certfile": api.tls_certificate, "ssl_keyfile": api.tls_key}
    if api.client_ca is not None:
        believe(context, "api.client_ca", api.client_ca)
        options |= {"ssl_ca_certs": api.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def towards_peers(api: ApiSection) -> ssl.SSLContext | None:
    """What other nodes' APIs are asked with. Where clients must show certificates of ``client_ca``, nodes show each other their
    own, and believe that authority beside the system's; None: the system's alone. Raises ConfigError."""
    if api.client_ca is None or api.tls_certificate is None:
        return None
    context = ssl.create_default_context()
    believe(context, "api.client_ca", api.client_ca)
    show(context, "api.tls_certificate", api.tls_certificate, api.tls_key)
    return context


def towards_api(authority: str, certificate: str) -> ssl.SSLContext | None:
    """What commands ask with, by ``KVSTORE_API_CA`` and ``KVSTORE_API_CERTIFICATE``: names of PEM files, the second with a
    certificate and its key; empty: the system's authorities, no certificate. Raises ConfigError."""
    if not authority and not certificate:
        return None
    context = ssl.create_default_context()
    if authority:
        believe(context, "KVSTORE_API_CA", Path(authority))
    if certificate:
        show(context, "KVSTORE_API_CERTIFICATE", Path(certificate))
    return context
