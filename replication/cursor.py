"""How far a region has come with one source: an object in its own bucket, so that any replica goes on from there."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from kvstore.catalog.cursors import SourceCursor
from kvstore.errors import BlockTooLarge
from kvstore.parsing import parse_json
from replication.links import Links
from replication.names import charges_folder, cursor_name

STEP_BYTES = 64 << 20
"""Charged at a time: what a kill may lose."""
_MAX_BYTES = 1 << 20


def month_of(now: float) -> str:
    """``2026-11``, UTC."""
    return time.strftime("%Y-%m", time.gmtime(now))


@dataclass(slots=True)
class Spent:
    """What one flow has cost in a month."""

    month: str = ""
    """``2026-11``, UTC."""
    nbytes: int = 0

    def roll(self, now: float) -> None:
        """Begin anew in a new month."""
        month = month_of(now)
        if self.month != month:
            self.month, self.nbytes = month, 0


@dataclass(slots=True)
class Cursor:
    """Everything that must outlive a replicator besides the blocks themselves."""

    source: str
    sequence: int = 0
    """Highest sequence of a manifest believed so far: an older one is a replay."""
    published: float = 0.0
    """When that manifest was published, seconds since the epoch."""
    caught_up: float = 0.0
    """When the newest manifest was published all of whose plan has been copied."""
    blocks: int = 0
    nbytes: int = 0
    """Copied so far."""
    spent: dict[str, Spent] = field(default_factory=dict)
    """By flow."""
    updated: float = 0.0
    problem: str = ""
    """Why the last cycle fell short; empty when it did not."""
    away_since: float = 0.0
    """When its bucket was first found not to answer; 0: it answers."""

    def lag(self, now: float) -> float | None:
        """Seconds by which the destination is behind; None before it was ever level."""
        return max(0.0, now - self.caught_up) if self.caught_up else None

    def spending(self, flow: str, now: float) -> Spent:
        spent = self.spent.setdefault(flow, Spent())
        spent.roll(now)
        return spent

    @property
    def told(self) -> SourceCursor:
        """What of it anybody may ask the catalog for."""
        return SourceCursor(
            source=self.source,
            sequence=self.sequence,
            published=self.published,
            caught_up=self.caught_up,
            blocks=self.blocks,
            nbytes=self.nbytes,
            updated=self.updated,
            problem=self.problem,
        )

    async def save(self, bucket: Links) -> None:
        """Raises TierUnavailable."""
        self.updated = time.time()
        await bucket.put(cursor_name(self.source), json.dumps(asdict(self), indent=1).encode(), create=False)

    @classmethod
    async def load(cls, bucket: Links, source: str) -> Cursor:
        """A new one when there is none, or none that can be read. Raises TierUnavailable."""
        try:
            body = await bucket.read(cursor_name(source), _MAX_BYTES)
            fields: dict[str, Any] = parse_json(body) if body else {}
            spent = {flow: Spent(**known) for flow, known in fields.pop("spent", {}).items()}
            return cls(**{**fields, "source": source}, spent=spent)
        except (ValueError, TypeError, AttributeError, BlockTooLarge):
            return cls(source)


class Ledger:
    """Charges a flow for bytes before they are sent, so that a killed replicator has never spent more than is written down.

    What was charged and not sent is given back at the end; a kill loses at most ``STEP_BYTES``. Nodes that read on demand
    charge the same flow (``replication.purse``).
    """

    def __init__(self, bucket: Links, cursor: Cursor, flow: str, limit: int | None) -> None:
        """``limit``: bytes that the month's money pays for."""
        self._bucket = bucket
        self._cursor = cursor
        self._flow = flow
        self._limit = limit
        self._prepaid = 0
        self._turn = asyncio.Lock()

    async def spend(self, nbytes: int) -> bool:
        """Pay for ``nbytes``; False when the money is gone."""
        async with self._turn:
            if self._prepaid < nbytes and not await self._prepay(nbytes - self._prepaid):
                return False
            self._prepaid -= nbytes
            return True

    async def _prepay(self, missing: int) -> bool:
        step = max(missing, STEP_BYTES)
        if self._limit is not None:
            step = min(step, await uncharged(self._bucket, self._cursor, self._flow, self._limit))
            if step < missing:
                return False
        self._charge(step)
        await self._cursor.save(self._bucket)
        if self._limit is not None and await uncharged(self._bucket, self._cursor, self._flow, self._limit) < 0:
            self._charge(-step)  # a node charged at the same time
            await self._cursor.save(self._bucket)
            return False
        self._prepaid += step
        return True

    async def settle(self) -> None:
        """Give back what was not used."""
        self._charge(-self._prepaid)
        self._prepaid = 0
        await self._cursor.save(self._bucket)

    def _charge(self, nbytes: int) -> None:
        self._cursor.spending(self._flow, time.time()).nbytes += nbytes


async def charges(bucket: Links, flow: str, month: str) -> dict[str, int]:
    """Bytes that nodes have charged a flow, by node. Raises TierUnavailable."""
    found: dict[str, int] = {}
    for one in await bucket.listing(charges_folder(flow, month)):
        folder, _, nbytes = one.name.rpartition("/")
        node = folder.rpartition("/")[2]
        if nbytes.isdecimal() and len(nbytes) < 19:
            found[node] = max(found.get(node, 0), int(nbytes))
    return found


async def uncharged(bucket: Links, cursor: Cursor, flow: str, limit: int) -> int:
    """What neither replicator nor nodes have charged of the bytes that a month's money pays for. Raises TierUnavailable."""
    now = time.time()
    nodes = await charges(bucket, flow, month_of(now))
    return limit - cursor.spending(flow, now).nbytes - sum(nodes.values())
