"""Encryption at rest, as a wrapper of a tier: what is below it sees ciphertext only.

AES-256-GCM with a random 96-bit nonce a block. The tag covers the payload and what the header says of it, so neither can be
changed, nor a payload be put under another key. Key id, nonce and tag are in the header: ciphertext is as long as plaintext,
indices and listings work without a key, and replication copies blocks as they are. A key may encrypt 2^32 blocks (NIST
SP 800-38D, 8.3): rotate it well before.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import structlog

from kvstore.encryption import KEY_ID_BYTES, KeyRing
from kvstore.envelope import HEADER_BYTES, Header, crc32c
from kvstore.errors import BlockCorrupt, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.tiers.base import PutResult, Tier
from kvstore.tiers.tasks import run
from kvstore.tiers.wrappers import Wrapped

log = structlog.get_logger(__name__)

AES_256_GCM = 1
"""The codec's id."""
NONCE_BYTES, TAG_BYTES = 12, 16
STAGES = 16
"""Blocks that are encrypted, or wait encrypted for the tier, at a time: engines may read the arena's copy meanwhile, so
encryption needs memory of its own, which this bounds."""
THREADS = 2
_SLICE = 256 << 10
"""Bytes in one call of the cipher, which keeps the interpreter lock: some 60 us."""
_CIPHER = struct.Struct(f"<{KEY_ID_BYTES}s{NONCE_BYTES}s{TAG_BYTES}s")
_AUTHENTICATED = struct.Struct("<16s16s16sIIQ8s")


class Encrypting(Wrapped):
    """Encrypts what is put and decrypts what is got.

    A block that is not encrypted is dropped as a bad one, since anybody could have written it; so is one whose tag does not
    match. One under an unknown key is left alone and raises TierUnavailable: the key may come back.
    """

    def __init__(self, inner: Tier, keys: KeyRing) -> None:
        super().__init__(inner)
        self._keys = keys
        self._stages = asyncio.Semaphore(STAGES)
        self._idle: list[mmap.mmap] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="encrypt")

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        if header.key in self.inner.keys():
            return PutResult.PRESENT
        async with self._stages:
            with self._stage(header.envelope_bytes) as stage:
                encrypted = await run(self._pool, self._encrypt, header, envelope, stage)
                return await self.inner.put(encrypted, stage)

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        header = await self.inner.get(key, into)
        try:
            return await run(self._pool, self._decrypt, header, into)
        except BlockCorrupt:
            log.warning("bad block dropped", tier=self.medium.value, block=key.hex(), problem="not authentic")
            await self.inner.delete([key])
            raise

    async def close(self) -> None:
        await self.inner.close()
        self._pool.shutdown()

    def keys_for(self, header: Header) -> KeyRing:
        """Those of a block. Called in the wrapper's own threads."""
        return self._keys

    def _encrypt(self, header: Header, envelope: memoryview, stage: memoryview) -> Header:
        identity, secret = self.keys_for(header).active()
        nonce = os.urandom(NONCE_BYTES)
        header = replace(header, codecs=(*header.codecs, AES_256_GCM))
        cipher = _aes_gcm(secret, nonce).encryptor()
        cipher.authenticate_additional_data(_authenticated(header, identity))
        source, target = (view[HEADER_BYTES : HEADER_BYTES + header.length] for view in (envelope, stage))
        for start in range(0, header.length, _SLICE):
            cipher.update_into(source[start : start + _SLICE], target[start : start + _SLICE])
        cipher.finalize()
        stage[HEADER_BYTES + header.length : header.envelope_bytes] = bytes(
            header.envelope_bytes - HEADER_BYTES - header.length
        )
        header = replace(header, crc=crc32c(target), cipher=_CIPHER.pack(identity, nonce, cipher.tag))
        header.pack_into(stage)
        return header

    def _decrypt(self, header: Header, envelope: memoryview) -> Header:
        """In place; the header becomes that of the plaintext. Raises BlockCorrupt, TierUnavailable."""
        from cryptography.exceptions import InvalidTag

        if not header.codecs or header.codecs[-1] != AES_256_GCM:
            raise BlockCorrupt("not encrypted")
        identity, nonce, tag = _CIPHER.unpack_from(header.cipher)
        secret = self.keys_for(header).get(identity)
        if secret is None:
            raise TierUnavailable(f"encrypted under key {identity.hex()}, which is not configured")
        cipher = _aes_gcm(secret, nonce, tag).decryptor()
        cipher.authenticate_additional_data(_authenticated(header, identity))
        payload = envelope[HEADER_BYTES : HEADER_BYTES + header.length]
        for start in range(0, header.length, _SLICE):
            part = payload[start : start + _SLICE]
            cipher.update_into(part, part)
        try:
            cipher.finalize()
        except InvalidTag:
            raise BlockCorrupt("payload or header is not what was encrypted") from None
        plain = replace(header, crc=crc32c(payload), codecs=header.codecs[:-1], cipher=b"")
        plain.pack_into(envelope)
        return plain

    @contextmanager
    def _stage(self, nbytes: int) -> Iterator[memoryview]:
        """Page-aligned memory of at least this size, used again when it fits."""
        memory = next((memory for memory in self._idle if len(memory) >= nbytes), None)
        if memory is None:
            memory = mmap.mmap(-1, nbytes)
        else:
            self._idle.remove(memory)
        try:
            yield memoryview(memory)[:nbytes]
        finally:
            self._idle = [memory, *self._idle][:STAGES]


def _aes_gcm(secret: bytes, nonce: bytes, tag: bytes | None = None) -> Any:
    """A cipher. Imported here: a node that encrypts nothing has 7 MB less."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import GCM

    return Cipher(AES(secret), GCM(nonce, tag))


def _authenticated(header: Header, identity: bytes) -> bytes:
    """What the tag covers besides the payload; all of it is said by the header."""
    codecs = bytes(header.codecs).ljust(8, b"\x00")
    fields = (header.namespace, header.key, header.parent, header.index, header.tokens, header.length, codecs)
    return _AUTHENTICATED.pack(*fields) + identity
