"""Writes published blocks down to the slower tiers, off everybody's path.

Saving is optional work: the queue is bounded in bytes, and what does not fit is dropped and counted. A block stays pinned
in the arena while it waits, so the bound is also the share of the arena that eviction cannot have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from kvstore import tracing
from kvstore.envelope import Header
from kvstore.errors import TierError
from kvstore.history import History, What
from kvstore.identity import BlockKey
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import PutResult, Tier
from kvstore.tiers.host import HostTier

log = structlog.get_logger(__name__)


class Writeback:
    """One queue and a few workers for one slower tier."""

    def __init__(
        self, host: HostTier, tier: Tier, metrics: StoreMetrics, history: History, limit_bytes: int, workers: int
    ) -> None:
        self.tier = tier
        self.queued_bytes = 0
        self._host = host
        self._metrics = metrics
        self._history = history
        self._limit = limit_bytes
        self._pending: dict[BlockKey, asyncio.Future[bool]] = {}
        self._writing: set[BlockKey] = set()
        self._forgotten: set[BlockKey] = set()
        self._queue: asyncio.Queue[tuple[Header, int, str]] = asyncio.Queue()
        self._workers = [asyncio.create_task(self._work()) for _ in range(workers)]

    @property
    def fill(self) -> float:
        """Share of the queue that is taken, 0 to 1."""
        return self.queued_bytes / self._limit

    def has(self, key: BlockKey) -> bool:
        """The tier holds the block, or will soon."""
        return key in self._pending or key in self.tier.keys()

    def offer(self, header: Header) -> asyncio.Future[bool] | None:
        """Queue a block that the host tier holds. The future tells whether the tier holds it; None: dropped."""
        key = header.key
        if (pending := self._pending.get(key)) is not None:
            return pending
        size = header.envelope_bytes
        if self.queued_bytes + size > self._limit or (offset := self._host.pin(key)) is None:
            self._metrics.dropped.labels(self.tier.medium.value).inc()
            self._history.record(What.QUEUE_FULL, [key], self.tier.medium)
            return None
        self.queued_bytes += size
        future = self._pending[key] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((header, offset, tracing.traceparent()))
        return future

    async def forget(self, keys: Iterable[BlockKey]) -> None:
        """Do not write these blocks; returns when none of them is being written any more."""
        pending = self._pending.keys() & set(keys)
        self._forgotten |= pending - self._writing
        await asyncio.gather(*(self._pending[key] for key in pending & self._writing))

    async def drain(self) -> None:
        """Wait until everything queued so far was written or given up."""
        await asyncio.gather(*self._pending.values(), return_exceptions=True)

    async def close(self) -> None:
        """Stop the workers; what is still queued is dropped."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            header, offset, trace = await self._queue.get()
            stored = False
            try:
                if header.key not in self._forgotten:
                    self._writing.add(header.key)
                    stored = await self._write(header, offset, trace)
            finally:
                self._writing.discard(header.key)
                self._forgotten.discard(header.key)
                self.queued_bytes -= header.envelope_bytes
                self._host.unpin(header.key, offset)
                self._pending.pop(header.key).set_result(stored)

    async def _write(self, header: Header, offset: int, trace: str) -> bool:
        """``trace`` is that of who offered the block."""
        medium = self.tier.medium.value
        try:
            with tracing.span(f"{medium} put", trace, block=header.key, bytes=header.envelope_bytes):
                result = await self.tier.put(header, self._host.slot(offset)[: header.envelope_bytes])
        except TierError as error:
            log.warning("block not written", tier=medium, block=header.key.hex(), error=str(error))
            self._metrics.written.labels(medium, "failed").inc()
            self._history.record(What.WRITE_FAILED, [header.key], self.tier.medium)
            return False
        self._metrics.written.labels(medium, result.value).inc()
        stored = result is not PutResult.REFUSED
        self._history.record(What.WRITTEN if stored else What.NO_ROOM, [header.key], self.tier.medium)
        return stored
