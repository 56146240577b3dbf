"""What nodes pay for reading on demand out of a flow's ``money_per_month``, which all of them share with the replicator.

    spent/{flow}/{month}/{node}/{bytes}

Each node keeps one object with what it has charged in a month, in its name, so that one listing shows the charges of all; where
a node died between two of its own the larger counts. The replicator's charge is in its cursor. Whoever charges writes first and
then adds up what all have charged: is that more than the month's money, it takes its own charge back. So of two that charge at
the same time at least the later one sees both, and together they never spend more than there is.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from kvstore.errors import TierUnavailable
from replication.cursor import STEP_BYTES, Cursor, charges, month_of, uncharged
from replication.links import Links
from replication.names import charges_folder
from replication.planner import affordable
from replication.topology import Flow

log = structlog.get_logger(__name__)


class Purse:
    """One node's share of one flow's money. Owned by one event loop."""

    def __init__(self, bucket: Links, flow: Flow, node: str) -> None:
        """``bucket``: the region's own; ``node``: this one's name in the region."""
        whole = affordable(flow.money_per_month, flow.price_per_gb)
        assert whole is not None
        self._bucket = bucket
        self._flow = flow
        self._node = node
        self._whole = whole
        self._month = ""
        self._names = {0}
        """What the bucket may have of this node."""
        self._charged = 0
        self._used = 0
        self._refused = 0
        """Bytes for which there was no money."""
        self._turn = asyncio.Lock()

    @property
    def spent(self) -> bool:
        """There was no money left the last time, and the month is the same."""
        return bool(self._refused) and self._month == month_of(time.time())

    async def look(self) -> None:
        """See whether there is money: others spend it, or give some back. Raises TierUnavailable."""
        async with self._turn:
            await self._roll()
            wanted = max(self._refused, 1)
            here = self._charged - self._used
            self._refused = 0 if here >= wanted or here + await self._left() >= wanted else wanted

    async def pay(self, nbytes: int) -> bool:
        """Charge before bytes are sent; False when the money is gone, until ``look`` finds some. Raises TierUnavailable."""
        async with self._turn:
            await self._roll()
            if self._refused and nbytes >= self._refused:
                return False
            missing = self._used + nbytes - self._charged
            if missing > 0 and not await self._charge(missing):
                log.warning(
                    "nothing more is read by a flow: its money is spent", flow=self._flow.identity, month=self._month
                )
                self._refused = nbytes
                return False
            self._used += nbytes
            return True

    async def close(self) -> None:
        """Give back what was not used, if the bucket answers."""
        async with self._turn:
            try:
                if self._names != {self._used}:
                    await self._write(self._used)
            except TierUnavailable:
                pass  # it counts as spent

    async def _roll(self) -> None:
        """Begin a month; a node that was restarted goes on from what it had charged."""
        month = month_of(time.time())
        if self._month != month:
            charged = (await charges(self._bucket, self._flow.identity, month)).get(self._node, 0)
            self._month, self._charged, self._used, self._refused = month, charged, charged, 0
            self._names = {charged}

    async def _charge(self, missing: int) -> bool:
        if self._names != {self._charged}:  # the bucket went away in the middle of a charge
            await self._write(self._charged)
        step = min(max(missing, STEP_BYTES), await self._left())
        if step < missing:
            return False
        await self._write(self._charged + step)
        if await self._left() < 0:
            await self._write(self._charged)
            return False
        self._charged += step
        return True

    async def _left(self) -> int:
        cursor = await Cursor.load(self._bucket, self._flow.source)
        return await uncharged(self._bucket, cursor, self._flow.identity, self._whole)

    async def _write(self, charged: int) -> None:
        """What is larger counts until the other is gone."""
        folder = f"{charges_folder(self._flow.identity, self._month)}/{self._node}"
        self._names.add(charged)
        await self._bucket.put(f"{folder}/{charged}", b"", create=False)
        await self._bucket.delete([f"{folder}/{other}" for other in self._names if other != charged])
        self._names = {charged}
