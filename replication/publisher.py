"""Publishes a region's manifest, and keeps dead blocks out of it."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object.names import block_name
from replication.hotset import (
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
from replication.names import manifest_name, tombstone_name
from replication.tombstones import Tombstone, buried

DELETED_AT_ONCE = 1000
CLOCK_MARGIN_SECONDS = 300.0
"""Clocks of buckets and nodes may differ by so much; within it, a block's own header decides."""


async def publish(bucket: Links, region: str, key: Ed25519PrivateKey) -> Manifest:
    """Find what is hot, sign it, put it where other regions look. Raises TierUnavailable.

    The sequence follows the clock, so it goes on rising when the last manifest was lost.
    """
    now = time.time()
    previous = await kept_manifest(bucket, region)
    tombstones = await read_tombstones(bucket)
    hot = await find_hot_set(bucket, previous.blocks if previous else (), now)
    dead = buried(hot.blocks, hot.labels, tombstones)
    if dead:
        await bucket.delete([block_name(block.namespace, block.key) for block in hot.blocks if block.key in dead])
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
    for start in range(0, len(names), DELETED_AT_ONCE):
        await bucket.delete(names[start : start + DELETED_AT_ONCE])
    return len(names)
