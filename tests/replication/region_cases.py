"""Regions for tests: buckets with real chains in them, and the manifests that describe these."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterable, Sequence

import obstore
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.identity import BlockKey, Namespace
from kvstore.testing.blocks import SealedBlock, random_chain
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name, namespace_name, parse_block_name
from kvstore.tiers.object.objects import Objects
from replication.manifest import HotBlock, Label, Manifest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EU_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PAYLOAD_BYTES = 10_000
LLAMA = Namespace(
    model="llama", weights="1", dtype="bfloat16", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
LABEL = Label(LLAMA.digest, "llama", "default", 16)


def chain(source: random.Random, blocks: int, payload_bytes: int = PAYLOAD_BYTES) -> list[SealedBlock]:
    """A sealed chain in the namespace ``LLAMA``."""
    sealed = []
    for block in random_chain(source, blocks, payload_bytes):
        header = dataclasses.replace(block.header, namespace=LLAMA.digest)
        header.pack_into(block.envelope)
        sealed.append(SealedBlock(header, block.envelope))
    return sealed


def store(settings: ObjectSettings, blocks: Iterable[SealedBlock]) -> None:
    """Put blocks and their namespace into a bucket."""
    bucket = Objects.connect(settings).store
    for block in blocks:
        obstore.put(bucket, block_name(block.header.namespace, block.key), bytes(block.envelope))
    obstore.put(bucket, namespace_name(LLAMA.digest), json.dumps(LLAMA.to_dict()).encode())


def stored(settings: ObjectSettings) -> dict[BlockKey, bytes]:
    """Every block of a bucket."""
    bucket = Objects.connect(settings).store
    found = {}
    for page in obstore.list(bucket, "blocks"):
        for meta in page:
            parsed = parse_block_name(meta["path"])
            assert parsed is not None
            found[parsed[1]] = bytes(obstore.get(bucket, meta["path"]).bytes())
    return found


def hot(blocks: Sequence[SealedBlock], score: float = 1.0) -> list[HotBlock]:
    """Manifest rows for a chain, hottest first."""
    return [
        HotBlock(b.key, b.header.parent, b.header.namespace, b.header.length, b.header.created, score / (1 + place))
        for place, b in enumerate(blocks)
    ]


def manifest_of(blocks: Sequence[HotBlock], region: str = "na", sequence: int = 1, **fields: object) -> Manifest:
    return Manifest(
        region=region,
        sequence=sequence,
        published=time.time(),
        labels={LABEL.digest: LABEL},
        blocks=blocks,
        **fields,  # type: ignore[arg-type]
    )
