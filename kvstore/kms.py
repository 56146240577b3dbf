"""Keys that AWS KMS has encrypted: in a keyring, ``id:kms:ciphertext`` (base64) stands for ``id:key``.

What is on disk is of no use without the right to ask the KMS, and each use of that right is in its log. A ciphertext is bound to
its id by the encryption context. Any service that speaks the same protocol does.
"""

from __future__ import annotations

import base64
import binascii
import os
from functools import cache
from threading import Lock
from typing import Any

from kvstore.errors import ConfigError

MARK = ":kms:"
KEY_ID_BYTES = 8
SECRET_BYTES = 32
TIMEOUT_SECONDS = 10.0
"""For one answer; it is asked twice more."""


class Kms:
    """A KMS, and what it has decrypted already. Any thread may call.

    The AWS SDK finds credentials and address as it always does: ``AWS_ENDPOINT_URL_KMS`` names another one.
    """

    def __init__(self, region: str = "") -> None:
        """``region`` empty: as the SDK finds it. Nothing is asked yet."""
        self._region = region
        self._lock = Lock()
        self._client: Any = None
        self._known: dict[str, str] = {}

    def new_line(self, key: str) -> str:
        """A line for a keyring, its secret seen by the KMS alone. ``key``: id, ARN or ``alias/name``. Raises ConfigError."""
        identity = os.urandom(KEY_ID_BYTES).hex()
        made = self._ask(
            "generate_data_key_without_plaintext",
            KeyId=key,
            NumberOfBytes=SECRET_BYTES,
            EncryptionContext=_context(identity),
        )
        return f"{identity}{MARK}{base64.b64encode(made['CiphertextBlob']).decode()}"

    def unwrap(self, lines: str) -> str:
        """A keyring with its encrypted lines decrypted; each is asked for once. Raises ConfigError."""
        return "\n".join(self._unwrapped(line) if MARK in line else line for line in lines.split())

    def _unwrapped(self, line: str) -> str:
        with self._lock:
            if line not in self._known:
                identity, _, text = line.partition(MARK)
                try:
                    ciphertext = base64.b64decode(text, validate=True)
                except binascii.Error:
                    raise _refused("a line is not id:kms:base64") from None
                found = self._ask("decrypt", CiphertextBlob=ciphertext, EncryptionContext=_context(identity))
                self._known[line] = f"{identity}:{found['Plaintext'].hex()}"
            return self._known[line]

    def _ask(self, operation: str, **arguments: Any) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if self._client is None:
                retries: Any = {"total_max_attempts": 3, "mode": "standard"}
                self._client = boto3.session.Session().client(
                    "kms",
                    region_name=self._region or None,
                    config=Config(connect_timeout=TIMEOUT_SECONDS, read_timeout=TIMEOUT_SECONDS, retries=retries),
                )
            return getattr(self._client, operation)(**arguments)
        except (BotoCoreError, ClientError) as error:
            raise _refused(str(error)) from error


@cache
def kms_at(region: str = "") -> Kms:
    """One for the process, so that tenants that share a keyring do not each ask."""
    return Kms(region)


def _context(identity: str) -> dict[str, str]:
    return {"kvstore-key": identity}


def _refused(problem: str) -> ConfigError:
    remedy = "See that object.region or AWS_REGION is the key's, and that this role may kms:Decrypt with it."
    return ConfigError("encryption", "(not shown)", f"the KMS gives no key: {problem}", remedy)
