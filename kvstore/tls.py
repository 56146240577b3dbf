"""PEM files for TLS contexts, by every listener and client of the project."""

from __future__ import annotations

import ssl
from pathlib import Path

from kvstore.errors import ConfigError


def show(context: ssl.SSLContext, setting: str, certificate: Path, key: Path | None = None) -> None:
    """Identify with this; without ``key`` the file has it too. Raises ConfigError that names ``setting``."""
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks the terminal for an encrypted key's
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        remedy = "Name PEM files with a certificate and its key, the key without a password."
        raise ConfigError(setting, str(certificate), str(error), remedy) from error


def believe(context: ssl.SSLContext, setting: str, authority: Path) -> None:
    """Accept certificates of this authority. Raises ConfigError that names ``setting``."""
    try:
        context.load_verify_locations(authority)
    except OSError as error:
        raise ConfigError(setting, str(authority), str(error), "Name a PEM file.") from error
