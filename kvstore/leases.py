"""Blocks brought to the arena and leased to clients: there they stay until every lease has been returned.

All state is owned by the node's event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore.envelope import HEADER_BYTES
from kvstore.history import History, What
from kvstore.identity import BlockKey
from kvstore.node.api import Miss
from kvstore.promotion import FETCHES_PER_ACQUIRE, Promoter
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import Medium
from kvstore.tiers.host import HostTier


@dataclass(slots=True, eq=False)
class Session:
    """What one client holds; all of it falls with ``Store.end``."""

    leases: dict[BlockKey, list[int]] = field(default_factory=dict)
    """Slot offset of each lease, by key."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What ``acquire`` brought: payload offsets of a prefix, where each block came from, and why it ended early."""

    offsets: list[int]
    media: list[Medium]
    miss: Miss | None


class Leases:
    """What a store leases of its host tier."""

    def __init__(self, host: HostTier, promoter: Promoter, metrics: StoreMetrics, history: History) -> None:
        self._host = host
        self._promoter = promoter
        self._metrics = metrics
        self._history = history

    async def acquire(self, session: Session, keys: Sequence[BlockKey], timeout: float) -> Delivery:
        """Lease a prefix of ``keys``, fetching what is not in the arena; at the deadline, what has arrived.

        Fetches that are under way at the deadline go on: they serve whoever asks next.
        """
        window = asyncio.Semaphore(FETCHES_PER_ACQUIRE)
        self._promoter.fetch_burst(keys)
        measurement = self._promoter.measure(keys)
        media: list[Medium] = []
        offsets: list[int] = []
        miss: Miss | None = None

        def lease(key: BlockKey, medium: Medium, offset: int) -> None:
            session.leases.setdefault(key, []).append(offset)
            media.append(medium)
            offsets.append(offset + HEADER_BYTES)

        for key in keys:  # what is in the arena needs no task
            if (ready := self._host.pin(key)) is None:
                break
            lease(key, self._promoter.origin(key), ready)
        first = len(offsets)
        tasks = [asyncio.create_task(self._pin(key, window)) for key in keys[first:]]
        try:
            async with asyncio.timeout(timeout):
                for key, task in zip(keys[first:], tasks, strict=True):
                    outcome = await asyncio.shield(task)
                    if isinstance(outcome, Miss):
                        miss = outcome
                        break
                    measurement.arrived(key)
                    lease(key, *outcome)
        except TimeoutError:
            miss = Miss.DEADLINE
        finally:
            kept = len(offsets)
            late = tasks[kept - first :]
            for task in late:
                task.cancel()
            for key, task in zip(keys[kept:], late, strict=True):
                task.add_done_callback(partial(self._unpin_unused, key))
        if miss is None:
            measurement.end(keys)
        elif miss is Miss.DEADLINE:
            self._promoter.measure_late(measurement, keys[:kept], keys[kept])
        for medium, count in Counter(media).items():
            self._metrics.delivered.labels(medium.value).inc(count)
        if miss is not None:
            self._metrics.missed.labels(miss.value).inc(len(keys) - kept)
        if miss is Miss.DEADLINE:
            self._history.record(What.DEADLINE, keys[kept:])
        elif miss is Miss.NO_ROOM:
            self._history.record(What.NO_ROOM, keys[kept:], Medium.HOST)
        return Delivery(offsets, media, miss)

    def release(self, session: Session, keys: Sequence[BlockKey]) -> None:
        """Return one lease of each key. Unknown leases are ignored."""
        for key in keys:
            offsets = session.leases.get(key)
            if not offsets:
                continue
            self._host.unpin(key, offsets.pop())
            if not offsets:
                del session.leases[key]

    def end(self, session: Session) -> None:
        """Return all leases of a client."""
        for key, offsets in session.leases.items():
            for offset in offsets:
                self._host.unpin(key, offset)
        session.leases.clear()

    async def _pin(self, key: BlockKey, window: asyncio.Semaphore) -> tuple[Medium, int] | Miss:
        if (offset := self._host.pin(key)) is not None:
            return self._promoter.origin(key), offset
        async with window:
            while True:
                outcome = await self._promoter.fetch(key)
                if isinstance(outcome, Miss):
                    return outcome
                if (offset := self._host.pin(key)) is not None:  # else evicted before we woke: fetch again
                    self._promoter.origin(key)
                    return outcome, offset

    def _unpin_unused(self, key: BlockKey, task: asyncio.Task[tuple[Medium, int] | Miss]) -> None:
        if not task.cancelled() and not task.exception() and not isinstance(outcome := task.result(), Miss):
            self._host.unpin(key, outcome[1])
