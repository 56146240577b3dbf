"""Publishes a region's manifest, and keeps dead blocks out of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object.names import block_name, tombstone_name
from kvstore.tombstones import Tombstone, buried
from replication.hotset import (
    CLOCK_MARGIN_SECONDS,
    Listed,
    find_hot_set,
    hot_block,
    kept_manifest,
    label_of,
    list_blocks,
    read_headers,
    read_namespaces,
    read_tombstones,
)
from replication.links import Links
from replication.manifest import MAX_TOMBSTONES, HotBlock, Manifest
from replication.names import manifest_name

DELETED_AT_ONCE = 1000


async def publish(bucket: Links, region: str, key: Ed25519PrivateKey) -> Manifest:
    """Find what is hot, sign it, put it where other regions look. Raises TierUnavailable.

    The sequence follows the clock, so it goes on rising when the last manifest was lost.
    """
    now = time.time()
    previous = await kept_manifest(bucket, region)
    tombstones = await read_tombstones(bucket)
    hot = await find_hot_set(bucket, previous, now)
    dead = buried(hot.blocks, hot.labels, tombstones)
    await _delete(bucket, [block_name(b.namespace, b.key) for b in reversed(hot.blocks) if b.key in dead])
    living: dict[BlockKey, HotBlock] = {}
    for block in hot.blocks:
        if block.key not in dead and (block.parent == NO_PARENT or block.parent in living):
            living[block.key] = block
    manifest = Manifest(
        region=region,
        sequence=max(previous.sequence + 1 if previous else 0, int(now * 1000)),
        published=now,
        labels=hot.labels,
        blocks=list(living.values()),
        tombstones=sorted(tombstones, key=lambda stone: stone.time)[-MAX_TOMBSTONES:],
    )
    await bucket.put(manifest_name(region), manifest.sealed(key), create=False)
    return manifest


async def entomb(bucket: Links, stones: list[Tombstone]) -> int:
    """Write tombstones down, then delete what they bury; how many blocks went. Raises TierUnavailable.

    Tails go before heads, so that no chain has a hole meanwhile.
    """
    for stone in stones:
        await bucket.put(tombstone_name(stone.identity), stone.to_json().encode(), create=True)
    labels = {digest: label_of(namespace) for digest, namespace in (await read_namespaces(bucket)).items()}
    listing = await list_blocks(bucket)
    dead: dict[BlockKey, tuple[int, Listed]] = {}
    doubtful: dict[BlockKey, Listed] = {}
    for key, block in listing.items():
        covering = [stone for stone in stones if stone.covers(block.namespace, labels.get(block.namespace))]
        if any(not s.prefix and block.modified <= s.time - CLOCK_MARGIN_SECONDS for s in covering):
            dead[key] = 0, block
        elif covering:
            doubtful[key] = block
    headers = sorted((await read_headers(bucket, doubtful)).values(), key=lambda header: header.index)
    gone = buried([hot_block(header) for header in headers], labels, stones)
    dead.update((h.key, (h.index, listing[h.key])) for h in headers if h.key in gone)
    names = [block_name(block.namespace, key) for key, (_, block) in sorted(dead.items(), key=lambda d: -d[1][0])]
    await _delete(bucket, names)
    return len(names)


async def _delete(bucket: Links, names: Sequence[str]) -> None:
    for start in range(0, len(names), DELETED_AT_ONCE):
        await bucket.delete(names[start : start + DELETED_AT_ONCE])
