"""Brings blocks from the slower tiers into the arena, each one once however many want it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.envelope import Header, envelope_bytes
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, TierError
from kvstore.history import History, What
from kvstore.identity import BlockKey
from kvstore.node.api import Miss
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.host import HostTier

FETCHES_PER_ACQUIRE = 32
"""Blocks that one acquire fetches at a time: enough to keep a tier busy, in order, so that a prefix arrives first."""


class Promoter:
    """Singleflight fetches into the host tier. Owned by the store's event loop."""

    def __init__(self, host: HostTier, lower: Sequence[Tier], history: History) -> None:
        self._host = host
        self._history = history
        self._lower = tuple(lower)
        self._flights: dict[BlockKey, asyncio.Task[Medium | Miss]] = {}
        self._speeds = {tier.medium: _Speed() for tier in lower}

    async def fetch(self, key: BlockKey) -> Medium | Miss:
        """Have the block published in the host tier; the tier it came from, or why it could not be had.

        Cancelling the caller does not cancel the fetch: it serves whoever asks next.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._promote(key))
            flight.add_done_callback(lambda _: self._flights.pop(key))
        return await asyncio.shield(flight)

    def estimate(self, keys: Sequence[BlockKey], runs: Sequence[tuple[Medium, int]]) -> float:
        """Seconds until the runs, which begin at the first key, are in the arena: from what fetches took lately."""
        seconds = 0.0
        position = 0
        for medium, count in runs:
            for tier in self._lower:
                if tier.medium is medium and (stat := tier.stat(keys[position])) is not None:
                    seconds += self._speeds[medium].estimate(count, stat.length)
            position += count
        return seconds

    async def settle(self, keys: Iterable[BlockKey]) -> None:
        """Wait until none of these blocks is being fetched."""
        await asyncio.gather(*(self._flights[key] for key in self._flights.keys() & set(keys)), return_exceptions=True)

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _promote(self, key: BlockKey) -> Medium | Miss:
        """From the fastest tier that delivers the block."""
        miss = Miss.NOT_STORED
        for tier in self._lower:
            if (stat := tier.stat(key)) is None:
                continue
            try:
                offset = self._host.allocate(envelope_bytes(stat.length), key)
            except BlockTooLarge:
                return Miss.NO_ROOM
            if offset is None:
                return Miss.NO_ROOM
            started = time.monotonic()
            header = None
            try:
                header = await tier.get(key, self._host.slot(offset))
            except BlockNotFound:
                self._history.record(What.GONE, [key], tier.medium)
                continue
            except (BlockCorrupt, BlockTooLarge):
                miss = Miss.CORRUPT
                self._history.record(What.CORRUPT, [key], tier.medium)
                continue
            except TierError:
                miss = Miss.UNAVAILABLE
                self._history.record(What.UNAVAILABLE, [key], tier.medium)
                continue
            finally:
                if header is None:
                    self._host.discard(offset)
            self._speeds[tier.medium].record(header, time.monotonic() - started)
            if key in self._host.keys():  # saved anew meanwhile
                self._host.discard(offset)
            else:
                self._host.publish(header, offset)
                self._history.record(What.FETCHED, [key], tier.medium)
            return tier.medium
        return miss


@dataclass(slots=True)
class _Speed:
    """Moving averages of what fetching a block takes, and of its bytes."""

    seconds: float = 0.0
    nbytes: float = 0.0

    def record(self, header: Header, seconds: float) -> None:
        weight = 0.1 if self.nbytes else 1.0
        self.seconds += weight * (seconds - self.seconds)
        self.nbytes += weight * (header.length - self.nbytes)

    def estimate(self, blocks: int, length: int) -> float:
        """Seconds for ``blocks`` of ``length`` bytes, fetched a window at a time; 0 before the first measurement."""
        if not self.nbytes:
            return 0.0
        return -(-blocks // FETCHES_PER_ACQUIRE) * self.seconds * length / self.nbytes
