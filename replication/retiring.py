"""Carries out a region's retention: reads what nodes report, decides, remembers, deletes from the index and then the bytes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgpack
import numpy as np
import structlog

from kvstore.errors import BlockTooLarge, TierUnavailable
from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.tiers.object.hotness import HotnessSnapshot
from replication.contents import Contents
from replication.hotset import kept_manifests, read_namespaces
from replication.links import Links
from replication.names import RETIRED, USES
from replication.retention import MOST_REMEMBERED, Retired, Uses, decide, observe, remember
from replication.topology import Retention

log = structlog.get_logger(__name__)

_MAX_BYTES = 24 * MOST_REMEMBERED + (1 << 20)


@dataclass
class RetireReport:
    """What was retired, or would be."""

    blocks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By model, tenant and reason."""
    nbytes: int = 0


async def retire(contents: Contents, rules: Sequence[Retention], enforce: bool) -> RetireReport:
    """One round. Without ``enforce`` nothing is deleted, and uses are learnt all the same. Raises TierUnavailable.

    What is about to be deleted is remembered first: a round that is killed in between is done again, and brings nothing back.
    """
    bucket, now = contents.bucket, time.time()
    blocks, namespaces = await contents.blocks(), await read_namespaces(bucket)
    reports = await contents.reports()
    heard = max((report.taken for report in reports), default=0.0)
    reports.append(HotnessSnapshot(now, 1.0, {}, dict.fromkeys(await contents.pinned(), now)))  # a pin counts as a use
    uses, retired = await _read_uses(bucket), await read_retired(bucket)
    uses, retired = await asyncio.to_thread(observe, blocks, reports, uses, retired, now)
    decision = await asyncio.to_thread(decide, blocks, namespaces, rules, uses, heard, now)
    report = RetireReport(nbytes=sum(entry.envelope_bytes for entry, _ in decision.blocks))
    for entry, reason in decision.blocks:
        namespace = namespaces[entry.namespace]
        report.blocks[namespace.model, namespace.tenant, reason.value] += 1
    await bucket.put(USES, _pack(uses.last, uses.first_seen), create=False)
    if not enforce:
        return report
    listed = {block.key for manifest in await kept_manifests(bucket) for block in manifest.blocks}
    await write_retired(bucket, remember(retired, decision, listed, now))
    try:
        await contents.delete(entry for entry, _ in decision.blocks)
    except TierUnavailable:
        await write_retired(bucket, retired)  # what is still there was not brought back by a use
        raise
    return report


async def read_retired(bucket: Links) -> Retired:
    """What retention has removed from this region's bucket. Raises TierUnavailable."""
    blocks, namespaces = await _read(bucket, RETIRED)
    return Retired(blocks, namespaces)


async def write_retired(bucket: Links, retired: Retired) -> None:
    """Raises TierUnavailable."""
    await bucket.put(RETIRED, _pack(retired.blocks, retired.namespaces), create=False)


async def _read_uses(bucket: Links) -> Uses:
    last, first_seen = await _read(bucket, USES)
    return Uses(last, first_seen)


def _pack(blocks: Mapping[BlockKey, int], namespaces: Mapping[bytes, int]) -> bytes:
    times = np.fromiter(blocks.values(), dtype="<u4", count=len(blocks))
    packed: bytes = msgpack.packb([b"".join(blocks), times.tobytes(), namespaces])
    return packed


async def _read(bucket: Links, name: str) -> tuple[dict[BlockKey, int], dict[bytes, int]]:
    """Empty when there is nothing that can be read: retention then goes by what the blocks say."""
    try:
        raw = await bucket.read(name, _MAX_BYTES)
        return ({}, {}) if raw is None else _unpack(raw)
    except (ValueError, TypeError, BlockTooLarge, msgpack.UnpackException) as error:
        log.warning("unreadable memory of retention", name=name, error=str(error))
        return {}, {}


def _unpack(raw: bytes) -> tuple[dict[BlockKey, int], dict[bytes, int]]:
    match msgpack.unpackb(raw):
        case [bytes(keys), bytes(times), dict(namespaces)] if len(keys) * 4 == len(times) * KEY_BYTES:
            pass
        case _:
            raise ValueError("not the fields of it")
    if not all(isinstance(d, bytes) and type(at) is int for d, at in namespaces.items()):
        raise ValueError("not namespaces")
    cut = (BlockKey(keys[i : i + KEY_BYTES]) for i in range(0, len(keys), KEY_BYTES))
    return dict(zip(cut, np.frombuffer(times, dtype="<u4").tolist(), strict=True)), namespaces
