"""Ed25519 keys with which regions sign their manifests. Private keys are PEM files, as openssl writes them."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from kvstore.errors import ConfigError

MAKE_ONE = "Make one with: kvstore region key FILE"


def create_key(path: Path) -> Ed25519PrivateKey:
    """Write a new private key that only its owner may read. Raises ConfigError, also when the file exists."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except OSError as error:
        remedy = "Name a new file in a folder that exists."
        raise ConfigError("FILE", str(path), error.strerror or "cannot be written", remedy) from error
    return key


def read_key(path: Path, field: str) -> Ed25519PrivateKey:
    """Raises ConfigError that names ``field``."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(field, str(path), error.strerror or "cannot be read", MAKE_ONE) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(field, str(path), "not an unencrypted PEM private key", MAKE_ONE) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(field, str(path), "not an Ed25519 key", MAKE_ONE)
    return key


def public_text(key: Ed25519PublicKey) -> str:
    """The form that a topology file has: base64 of the 32 bytes."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def parse_public(text: str) -> Ed25519PublicKey:
    """Raises ValueError."""
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
