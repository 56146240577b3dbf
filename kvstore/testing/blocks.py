"""Sealed envelopes for tests and benchmarks: random blocks and chains in page-aligned memory."""

from __future__ import annotations

import mmap
import random
import time
from dataclasses import dataclass

from kvstore.envelope import HEADER_BYTES, Header, crc32c, envelope_bytes
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey

NAMESPACE = b"conformance.test"
"""A namespace digest for blocks that belong to no model."""


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A header and the whole envelope that it describes."""

    header: Header
    envelope: memoryview

    @property
    def key(self) -> BlockKey:
        return self.header.key

    @property
    def payload(self) -> bytes:
        return bytes(self.envelope[HEADER_BYTES : HEADER_BYTES + self.header.length])


def aligned_buffer(nbytes: int) -> memoryview:
    """Zeroed, page-aligned memory, as tiers want it; lives as long as something refers to it."""
    return memoryview(mmap.mmap(-1, nbytes))


def seal(
    key: BlockKey,
    payload: bytes,
    *,
    parent: BlockKey = NO_PARENT,
    index: int = 0,
    tokens: int = 64,
    namespace: bytes = NAMESPACE,
    generation: int = 0,
) -> SealedBlock:
    """Put a payload in an envelope."""
    header = Header(
        key=key,
        namespace=namespace,
        parent=parent,
        index=index,
        tokens=tokens,
        length=len(payload),
        crc=crc32c(payload),
        generation=generation,
        created=time.time_ns() // 1000 / 1e6,
    )
    envelope = aligned_buffer(envelope_bytes(len(payload)))
    header.pack_into(envelope)
    envelope[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return SealedBlock(header, envelope)


def random_key(source: random.Random) -> BlockKey:
    return BlockKey(source.randbytes(KEY_BYTES))


def random_block(source: random.Random, payload_bytes: int) -> SealedBlock:
    """A chain of one block."""
    return seal(random_key(source), source.randbytes(payload_bytes))


def random_chain(source: random.Random, blocks: int, payload_bytes: int) -> list[SealedBlock]:
    """``blocks`` blocks, each the parent of the next."""
    chain: list[SealedBlock] = []
    for index in range(blocks):
        parent = chain[-1].key if chain else NO_PARENT
        chain.append(seal(random_key(source), source.randbytes(payload_bytes), parent=parent, index=index))
    return chain
