"""Keeps a region's bucket under its cap, by what the whole region knows.

Nodes keep the cap too, each by what it used itself, and only from the last sixteenth on. Where this runs it begins earlier, so
they find nothing to do: what goes is what no node of the region expects to use, and what no source calls hot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from kvstore.catalog.base import Entry
from kvstore.identity import BlockKey
from kvstore.tiers.object.hotness import merged
from replication.contents import Contents
from replication.hotset import kept_manifests
from replication.manifest import HotBlock

BEGIN_SHARE, END_SHARE = 3 / 32, 4 / 32
"""Parts of the cap: with less than the first free, blocks go until the second is."""
NEWCOMER = 0.8
"""What the score of a block that is not there yet counts for: one that is hardly better than another is not worth its way."""


async def make_room(contents: Contents, capacity: int) -> int:
    """Evict if the bucket is nearly full; how many blocks went. Raises TierUnavailable, CatalogUnavailable.

    Needs a catalog that covers the bucket: without one nobody knows how full it is.
    """
    used = await contents.used_bytes()
    if used is None or used <= capacity * (1 - BEGIN_SHARE):
        return 0
    scores, pinned = await known_scores(contents), await contents.pinned()
    blocks = await contents.blocks()
    excess = used - int(capacity * (1 - END_SHARE))
    return await contents.delete(await asyncio.to_thread(victims, blocks.values(), scores, excess, pinned))


async def known_scores(contents: Contents) -> dict[BlockKey, float]:
    """What the nodes of the region expect of their blocks, and the sources of theirs. Raises TierUnavailable."""
    scores = merged(await contents.reports(), time.time())
    for manifest in await kept_manifests(contents.bucket):
        for block in manifest.blocks:
            scores[block.key] = max(scores.get(block.key, 0.0), block.score)
    return scores


def overflow(
    blocks: Collection[Entry],
    scores: Mapping[BlockKey, float],
    coming: Sequence[HotBlock],
    capacity: int,
    pinned: AbstractSet[BlockKey] = frozenset(),
) -> set[BlockKey]:
    """Those of the blocks to come (parents first) that would be given up as soon as they are there; pure.

    Without them a copy into a bucket that is full comes to rest, in place of bringing the same blocks every round.
    """
    depths = {entry.key: entry.depth for entry in blocks}
    arrivals = []
    for block in coming:
        depth = depths[block.key] = depths.get(block.parent, -1) + 1
        arrivals.append(Entry(block.key, block.length, block.namespace, 0, depth, block.parent, stored=0))
    together = [*blocks, *arrivals]
    excess = sum(entry.envelope_bytes for entry in together) - int(capacity * (1 - END_SHARE))
    reduced = {**scores, **{block.key: NEWCOMER * block.score for block in coming}}
    return {entry.key for entry in victims(together, reduced, excess, pinned)} & {block.key for block in coming}


def victims(
    blocks: Collection[Entry],
    scores: Mapping[BlockKey, float],
    nbytes: int,
    pinned: AbstractSet[BlockKey] = frozenset(),
) -> list[Entry]:
    """The least valuable blocks that free ``nbytes``, each before its parent; pure.

    By score per byte, what has none before what has one, and by age among equals; what is pinned last of all. A block is worth
    at least as much as what continues it.
    """
    worth = {
        entry.key: (entry.key in pinned, scores.get(entry.key, 0.0) / entry.envelope_bytes, entry.stored)
        for entry in blocks
    }
    for entry in sorted(blocks, key=lambda entry: -entry.depth):
        above = worth.get(entry.parent)
        if above is not None and above < worth[entry.key]:
            worth[entry.parent] = worth[entry.key]
    chosen: list[Entry] = []
    for entry in sorted(blocks, key=lambda entry: (worth[entry.key], -entry.depth)):
        if nbytes <= 0:
            break
        chosen.append(entry)
        nbytes -= entry.envelope_bytes
    return chosen
