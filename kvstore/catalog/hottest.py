"""The prompts that a whole region asks for most, by what its nodes reported and where the index says their blocks are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.catalog.base import BATCH, Catalog, Entry
from kvstore.catalog.hotness import reports
from kvstore.identity import BlockKey
from kvstore.tiers.object.hotness import merged

LOOKED_UP = 20 * BATCH
"""Of the hottest blocks: enough for hundreds of prompts, some 30 ms of a server."""


@dataclass(frozen=True, slots=True)
class HotChain:
    """A prompt, named by its deepest hot block."""

    key: BlockKey
    namespace: bytes
    tokens: int
    nbytes: int
    seconds: float
    """Of prefill that its blocks are expected to save within an hour, on all nodes together."""
    nodes: int
    """That named the block."""


async def hottest(catalog: Catalog, limit: int) -> list[HotChain]:
    """The best ``limit`` prompts that are in the bucket, most seconds first. Raises CatalogUnavailable."""
    told = await reports(catalog.documents)
    scores = merged(told.values(), time.time())
    ranked = sorted(scores, key=lambda key: -scores[key])[:LOOKED_UP]
    entries: dict[BlockKey, Entry] = {}
    for start in range(0, len(ranked), BATCH):
        found = await catalog.lookup(ranked[start : start + BATCH])
        entries.update((entry.key, entry) for entry in found if entry is not None and entry.tokens)
    chains = chains_of(entries, scores)[:limit]
    return [
        HotChain(
            key=entry.key,
            namespace=entry.namespace,
            tokens=(entry.depth + 1) * entry.tokens,
            nbytes=(entry.depth + 1) * entry.envelope_bytes,
            seconds=seconds,
            nodes=sum(entry.key in report.scores for report in told.values()),
        )
        for entry, seconds in chains
    ]


def chains_of(entries: Mapping[BlockKey, Entry], scores: Mapping[BlockKey, float]) -> Sequence[tuple[Entry, float]]:
    """The blocks that no other of the ``entries`` continues, with the sum of their chains' scores, best first; pure."""
    sums: dict[BlockKey, float] = {}
    for entry in sorted(entries.values(), key=lambda entry: entry.depth):
        sums[entry.key] = scores[entry.key] + sums.get(entry.parent, 0.0)
    continued = {entry.parent for entry in entries.values()}
    tips = [(entry, sums[key]) for key, entry in entries.items() if key not in continued]
    return sorted(tips, key=lambda tip: (-tip[1], tip[0].key))
