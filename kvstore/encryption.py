"""Keys for encryption at rest.

A keyring is text: one ``id:key`` a line, both in hexadecimal, the active key first; the others only decrypt. To rotate, put a
new line on top and keep the old ones until nothing uses them. A line may be encrypted by a KMS (``kvstore/kms.py``).
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Protocol

import structlog

from kvstore.errors import ConfigError
from kvstore.kms import KEY_ID_BYTES as KEY_ID_BYTES  # a block's header has room for one
from kvstore.kms import MARK, SECRET_BYTES, kms_at

log = structlog.get_logger(__name__)

MAX_FILE_BYTES = 1 << 20
RETRY_SECONDS = 30.0
"""How long a file whose lines the KMS did not decrypt is left alone."""
_LINE = re.compile(rf"([0-9a-f]{{{2 * KEY_ID_BYTES}}}):([0-9a-f]{{{2 * SECRET_BYTES}}})")


class KeyRing(Protocol):
    """Keys of one tenant. Any thread may call; must not block for long."""

    def active(self) -> tuple[bytes, bytes]:
        """Id (8 bytes) and secret (32 bytes) of the key that encrypts now."""

    def get(self, identity: bytes) -> bytes | None:
        """The secret of a key; None when it is not known."""


class TenantKeys:
    """Keys of one tenant, derived from a keyring that tenants may share: what one tenant stores, another's key does not open."""

    def __init__(self, lines: str, tenant: str, source: str = "encryption.keys") -> None:
        """Raises ConfigError; ``source`` is the setting that it names."""
        found = [_LINE.fullmatch(line.strip()) for line in lines.split() if line.strip()]
        if not found:
            raise ConfigError(source, "", "holds no key", "Make one with: kvstore key")
        if not all(found):
            raise ConfigError(source, "(not shown)", "a line is not id:key", "Make keys with: kvstore key")
        pairs = [(bytes.fromhex(match[1]), bytes.fromhex(match[2])) for match in found if match]
        self._secrets = {identity: _derive(secret, tenant) for identity, secret in pairs}
        if len(self._secrets) < len(pairs):
            raise ConfigError(source, "(not shown)", "two keys have the same id", "Make keys with: kvstore key")
        self._active = pairs[0][0]

    def active(self) -> tuple[bytes, bytes]:
        return self._active, self._secrets[self._active]

    def get(self, identity: bytes) -> bytes | None:
        return self._secrets.get(identity)


Unwrap = Callable[[str], str]
"""A keyring's text with what a KMS has encrypted in it decrypted. Raises ConfigError."""


class KeyFile:
    """``TenantKeys`` from a file that is read again when it changes, so that keys rotate without a restart.

    Lines that a KMS must decrypt are asked for in a thread, so that no block waits: meanwhile the keys are those of before.
    """

    def __init__(self, path: Path, tenant: str, unwrap: Unwrap | None = None) -> None:
        """Raises ConfigError."""
        self._path = path
        self._tenant = tenant
        self._unwrap = unwrap or kms_at().unwrap
        self._seen: tuple[int, int] = (0, 0)
        self._complained_of = self._seen
        self._rests_until = 0.0
        text, self._seen = self._read()
        self._keys = self._parse(text)

    def active(self) -> tuple[bytes, bytes]:
        self._refresh()
        return self._keys.active()

    def get(self, identity: bytes) -> bytes | None:
        secret = self._keys.get(identity)
        if secret is None:
            self._refresh()
            secret = self._keys.get(identity)
        return secret

    def _refresh(self) -> None:
        """A file that is bad or gone leaves the keys as they are."""
        if time.monotonic() < self._rests_until:
            return
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_ino) == self._seen:
                return
            text, seen = self._read()
            if MARK in text:
                self._rests_until = time.monotonic() + RETRY_SECONDS
                Thread(target=self._adopt, args=(text, seen), name="keys", daemon=True).start()
            else:
                self._adopt(text, seen)
        except (OSError, ConfigError):
            pass

    def _adopt(self, text: str, seen: tuple[int, int]) -> None:
        try:
            self._keys = self._parse(text)
        except ConfigError as error:
            if seen != self._complained_of:
                self._complained_of = seen
                log.warning("encryption keys not read again", error=str(error))
            return
        self._seen, self._rests_until = seen, 0.0

    def _parse(self, text: str) -> TenantKeys:
        return TenantKeys(self._unwrap(text), self._tenant, "encryption.key_file")

    def _read(self) -> tuple[str, tuple[int, int]]:
        """The file's text, and which version of it that is. Raises ConfigError."""
        try:
            stat = self._path.stat()
            if stat.st_mode & 0o027:
                remedy = f"chmod 600 {self._path}"
                raise ConfigError("encryption.key_file", str(self._path), "others may read it", remedy)
            if stat.st_size > MAX_FILE_BYTES:
                raise ConfigError("encryption.key_file", str(self._path), "too large", "Name the right file.")
            return self._path.read_text("ascii"), (stat.st_mtime_ns, stat.st_ino)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "encryption.key_file", str(self._path), str(error), "Make one with: kvstore key"
            ) from error


def new_key() -> str:
    """A line for a keyring."""
    return f"{os.urandom(KEY_ID_BYTES).hex()}:{secrets.token_hex(SECRET_BYTES)}"


def _derive(secret: bytes, tenant: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256  # here: a node that encrypts nothing has 7 MB less
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), SECRET_BYTES, salt=None, info=b"kvstore block " + tenant.encode()).derive(secret)
