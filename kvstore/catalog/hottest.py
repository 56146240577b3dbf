"""The prompts that a whole region asks for most, by what its nodes reported and where the index says their blocks are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.catalog.base import BATCH, Catalog, Entry
from kvstore.catalog.hotness import reports
from kvstore.demand import prefill_seconds
from kvstore.identity import BlockKey
from kvstore.tiers.object.hotness import merged

LOOKED_UP = 20 * BATCH
"""Of the hottest blocks: enough for hundreds of prompts, some 30 ms of a server."""


@dataclass(frozen=True, slots=True)
class HotChain:
    """A prompt, named by the block where it ends or prompts part."""

    key: BlockKey
    namespace: bytes
    tokens: int
    nbytes: int
    seconds: float
    """Of prefill that it is expected to save within an hour, on all nodes together."""
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
    chains = [
        HotChain(
            key=entry.key,
            namespace=entry.namespace,
            tokens=(entry.depth + 1) * entry.tokens,
            nbytes=(entry.depth + 1) * entry.envelope_bytes,
            seconds=scores[entry.key] * _whole_chain(entry),
            nodes=sum(entry.key in report.scores for report in told.values()),
        )
        for entry in deepest(entries, scores)
    ]
    return sorted(chains, key=lambda chain: (-chain.seconds, chain.key))[:limit]


def deepest(entries: Mapping[BlockKey, Entry], scores: Mapping[BlockKey, float]) -> list[Entry]:
    """The blocks that are hotter than each of the ``entries`` that continues them; pure.

    Others stand in the middle of a prompt, which is named by its end.
    """
    below: dict[BlockKey, float] = {}
    for entry in entries.values():
        below[entry.parent] = max(below.get(entry.parent, 0.0), scores[entry.key])
    return [entry for key, entry in entries.items() if scores[key] > below.get(key, 0.0)]


def _whole_chain(entry: Entry) -> float:
    """How many times as long as that block alone the chain to its end takes to compute."""
    end, start = (entry.depth + 1) * entry.tokens, entry.depth * entry.tokens
    return prefill_seconds(end) / (prefill_seconds(end) - prefill_seconds(start))
