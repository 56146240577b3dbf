"""Publishes a region's manifest, and keeps dead blocks out of it."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.catalog.base import Entry
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object.names import tombstone_name
from kvstore.tombstones import Tombstone, buried
from replication.contents import Contents
from replication.hotset import (
    CLOCK_MARGIN_SECONDS,
    describe,
    find_hot_set,
    kept_manifest,
    label_of,
    parents_first,
    read_namespaces,
)
from replication.manifest import MAX_TOMBSTONES, HotBlock, Manifest
from replication.names import manifest_name


async def publish(contents: Contents, region: str, key: Ed25519PrivateKey) -> Manifest:
    """Find what is hot, sign it, put it where other regions look. Raises TierUnavailable.

    The sequence follows the clock, so it goes on rising when the last manifest was lost.
    """
    now = time.time()
    bucket = contents.bucket
    previous = await kept_manifest(bucket, region)
    tombstones = await contents.tombstones()
    hot = await find_hot_set(contents, previous, now)
    dead = buried(hot.blocks, hot.labels, tombstones)
    await contents.delete(_entry(block) for block in reversed(hot.blocks) if block.key in dead)
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


async def entomb(contents: Contents, stones: list[Tombstone]) -> int:
    """Write tombstones down, then delete what they bury; how many blocks went. Raises TierUnavailable.

    Tails go before heads, so that no chain has a hole meanwhile.
    """
    bucket = contents.bucket
    for stone in stones:
        await bucket.put(tombstone_name(stone.identity), stone.to_json().encode(), create=True)
    await contents.purged()
    labels = {digest: label_of(namespace) for digest, namespace in (await read_namespaces(bucket)).items()}
    dead: list[Entry] = []
    doubtful: dict[BlockKey, Entry] = {}
    for key, block in (await contents.blocks()).items():
        covering = [stone for stone in stones if stone.covers(block.namespace, labels.get(block.namespace))]
        if any(not s.prefix and block.stored <= s.time - CLOCK_MARGIN_SECONDS for s in covering):
            dead.append(block)
        elif covering:
            doubtful[key] = block
    described = parents_first(await describe(bucket, doubtful))
    gone = buried(described, labels, stones)
    tails_first = [doubtful[block.key] for block in reversed(described) if block.key in gone]
    return await contents.delete([*tails_first, *sorted(dead, key=lambda block: -block.depth)])


def _entry(block: HotBlock) -> Entry:
    """What is needed of a block to delete it."""
    return Entry(block.key, block.length, block.namespace, 0, 0, block.parent, 0)
