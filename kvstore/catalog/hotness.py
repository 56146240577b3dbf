"""What is hot in a region: each node reports to the catalog every 15 seconds, and leaves a copy in the bucket each minute.

A node with several tenants tells of all in one report: of each tenant's blocks what its own engines' requests teach.

The copy is for when the catalog is away or was lost, and for a region that has none. Whoever needs the region's scores merges
the reports (``kvstore.tiers.object.hotness.merged``): of each node the one taken last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import structlog

from kvstore.catalog.documents import Documents
from kvstore.demand import Demand, prefill_seconds
from kvstore.errors import CatalogUnavailable, ProtocolError
from kvstore.index import Rows
from kvstore.tiers.object import ObjectTier
from kvstore.tiers.object.hotness import HotnessSnapshot, Ranking, rankable

log = structlog.get_logger(__name__)

FOLDER = "hotness"
COPY_SECONDS = 60.0
LASTS_SECONDS = 600.0
"""Of a node that is silent for longer, the copy in the bucket counts."""
PIECE = 8192
"""Blocks ranked between two looks at what clients ask: some 3 ms."""


Split = Callable[[Rows], Sequence[tuple[Demand, Rows]]]
"""Of some rows of the bucket's index those of each tenant, and what its engines ask for."""


class Reporter:
    """Tells the region what a node's engines ask for. In the node's event loop."""

    def __init__(
        self,
        demand: Demand,
        bucket: ObjectTier,
        node: str,
        documents: Documents | None,
        split: Split,
    ) -> None:
        """``node`` is the node's name in its region; ``documents`` are the catalog's, where there is one.

        ``split`` finds the blocks of its tenants; the others go by ``demand``.
        """
        self._split = split
        self._demand = demand
        self._bucket = bucket
        self._node = node
        self._documents = documents
        self._copied = -COPY_SECONDS

    async def __call__(self) -> None:
        """Report now. Raises TierError."""
        snapshot = await self._snapshot()
        told = self._documents is not None and await self._tell(self._documents, snapshot)
        if not told or time.monotonic() - self._copied >= COPY_SECONDS:
            await self._bucket.put_hotness(self._node, snapshot)
            self._copied = time.monotonic()

    async def _tell(self, documents: Documents, snapshot: HotnessSnapshot) -> bool:
        try:
            body = await asyncio.to_thread(snapshot.pack)
            await documents.put(f"{FOLDER}/{self._node}", body, LASTS_SECONDS)
        except CatalogUnavailable as error:
            log.info("hotness goes to the bucket only", error=str(error))
            return False
        return True

    async def _snapshot(self) -> HotnessSnapshot:
        """What is expected of the bucket's blocks, and what was counted of those that this node knows nothing else of."""
        ranking = Ranking(time.time(), prefill_seconds)
        rows = rankable(self._bucket.index)
        parts = self._split(rows)
        rest = np.setdiff1d(rows, np.concatenate([rows[:0], *(part for _, part in parts)]), assume_unique=True)
        counted = []
        for demand, part in ((self._demand, rest), *parts):
            counted.append(HotnessSnapshot.of(demand.hotness, ranking.now, prefill_seconds))
            for first in range(0, max(len(part), 1), PIECE):
                ranking.add(demand.traffic, self._bucket.index, part[first : first + PIECE])
                await asyncio.sleep(0)
        return await asyncio.to_thread(HotnessSnapshot.of_ranking, ranking, counted)


async def reports(documents: Documents) -> Mapping[str, HotnessSnapshot]:
    """What nodes reported last, by their names; what cannot be read is left out. Raises CatalogUnavailable."""
    found: dict[str, HotnessSnapshot] = {}
    for document in (await documents.read_all(FOLDER)).values():
        try:
            found[document.rest] = await asyncio.to_thread(HotnessSnapshot.unpack, document.body)
        except ProtocolError as error:
            log.warning("unreadable report", name=document.name, error=str(error))
    return found
