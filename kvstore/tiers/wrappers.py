"""Tiers around tiers: metering, a circuit breaker, fault injection.

Metered(Breaker(await ObjectTier.open(settings)), metrics)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from kvstore import tracing
from kvstore.envelope import HEADER_BYTES, Header
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.tiers.base import BlockStat, Medium, PutResult, Slot, Tier, TierStats

log = structlog.get_logger(__name__)


class Wrapped(Tier):
    """Passes everything on to ``inner`` but ``locate``, which goes past the wrapper; the base of the wrappers below."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.medium: Medium = inner.medium

    def keys(self) -> AbstractSet[BlockKey]:
        return self.inner.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        return self.inner.stat(key)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self.inner.touch(keys)

    def stats(self) -> TierStats:
        return self.inner.stats()

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        return await self.inner.put(header, envelope)

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        return await self.inner.get(key, into)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        return await self.inner.delete(keys)

    async def close(self) -> None:
        await self.inner.close()


# --- metering

_OUTCOMES: dict[type[BaseException], str] = {
    BlockNotFound: "not_found",
    BlockCorrupt: "corrupt",
    BlockTooLarge: "too_large",
    TierUnavailable: "unavailable",
    asyncio.CancelledError: "cancelled",
}


class TierMetrics:
    """Counters shared by the metered tiers of a process. All label values come from enums and tables: their number is
    bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("tier", "operation", "outcome")
        self.operations = Counter(
            "kvstore_tier_operations", "Operations on a tier, by outcome", labels, registry=registry
        )
        self.nbytes = Counter(
            "kvstore_tier_bytes", "Bytes of blocks put to and got from a tier", ("tier", "operation"), registry=registry
        )
        self.seconds = Histogram(
            "kvstore_tier_seconds",
            "Time that operations on a tier took",
            ("tier", "operation"),
            registry=registry,
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
        )


class Metered(Wrapped):
    """Counts operations, bytes and time."""

    def __init__(self, inner: Tier, metrics: TierMetrics, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self._metrics = metrics
        self._clock = clock

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        with self._measured("put") as measurement:
            result = await self.inner.put(header, envelope)
            measurement.outcome = result.value
            measurement.nbytes = header.envelope_bytes if result is PutResult.STORED else 0
            return result

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        with self._measured("get") as measurement:
            header = await self.inner.get(key, into)
            measurement.nbytes = header.envelope_bytes
            return header

    def locate(self, key: BlockKey) -> Slot | None:
        return self.inner.locate(key)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        with self._measured("delete"):
            return await self.inner.delete(keys)

    @contextmanager
    def _measured(self, operation: str) -> Iterator[_Measurement]:
        measurement = _Measurement()
        tier = self.medium.value
        started = self._clock()
        try:
            yield measurement
        except BaseException as error:
            measurement.outcome = _OUTCOMES.get(type(error), "error")
            raise
        finally:
            self._metrics.seconds.labels(tier, operation).observe(self._clock() - started, tracing.exemplar())
            self._metrics.operations.labels(tier, operation, measurement.outcome).inc()
            if measurement.nbytes:
                self._metrics.nbytes.labels(tier, operation).inc(measurement.nbytes)


@dataclass(slots=True)
class _Measurement:
    outcome: str = "ok"
    nbytes: int = 0


# --- circuit breaker


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    """Nothing gets through."""
    HALF_OPEN = "half_open"
    """The next operation is let through as a trial, or is under way."""


class Breaker(Wrapped):
    """Stops asking a tier that does not answer, and tries again by itself.

    After ``failures`` operations in a row that end in TierUnavailable it opens: operations raise TierUnavailable at once and
    ``keys`` offers no block, so that lookups see a miss and not a hit that cannot be delivered. After a delay, which doubles
    from ``first_delay`` to ``last_delay`` seconds with each trial that fails, ``keys`` offers blocks again and the first
    operation is let through; its success closes the breaker.
    """

    def __init__(
        self,
        inner: Tier,
        failures: int = 3,
        first_delay: float = 1.0,
        last_delay: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._limit = failures
        self._first_delay = first_delay
        self._last_delay = last_delay
        self._clock = clock
        self._failures = 0
        self._delay = first_delay
        self._retry_at = 0.0
        self._trial = False

    @property
    def state(self) -> BreakerState:
        if self._failures < self._limit:
            return BreakerState.CLOSED
        if self._trial or self._clock() >= self._retry_at:
            return BreakerState.HALF_OPEN
        return BreakerState.OPEN

    def keys(self) -> AbstractSet[BlockKey]:
        return frozenset() if self.state is BreakerState.OPEN else self.inner.keys()

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        async with self._guarded():
            return await self.inner.put(header, envelope)

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        async with self._guarded():
            return await self.inner.get(key, into)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        async with self._guarded():
            return await self.inner.delete(keys)

    @asynccontextmanager
    async def _guarded(self) -> AsyncIterator[None]:
        trial = self.state is BreakerState.HALF_OPEN
        if self.state is BreakerState.OPEN or (trial and self._trial):
            raise TierUnavailable(f"the {self.medium.value} tier did not answer; it is tried again later")
        self._trial = self._trial or trial
        try:
            yield
        except TierUnavailable:
            self._failed(trial)
            raise
        except (BlockNotFound, BlockCorrupt, BlockTooLarge):
            self._answered()
            raise
        else:
            self._answered()
        finally:
            self._trial = self._trial and not trial

    def _answered(self) -> None:
        if self._failures >= self._limit:
            log.info("tier answers again", tier=self.medium.value)
        self._failures = 0
        self._delay = self._first_delay

    def _failed(self, trial: bool) -> None:
        self._failures += 1
        if trial:
            self._delay = min(2 * self._delay, self._last_delay)
        if trial or self._failures == self._limit:
            self._retry_at = self._clock() + self._delay
            log.warning("tier does not answer", tier=self.medium.value, retry_seconds=self._delay)


# --- fault injection


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong, and how often (0 to 1)."""

    unavailable: float = 0.0
    """Operations that fail with TierUnavailable."""
    corrupt: float = 0.0
    """Gets whose bytes arrive with one bit flipped; they are reported as BlockCorrupt and the block is deleted."""
    delay: float = 0.0
    """Seconds that every operation waits first."""


class Faulty(Wrapped):
    """Makes a tier misbehave, for tests. The same seed gives the same faults; ``faults`` may be replaced at any time."""

    def __init__(self, inner: Tier, faults: Faults, seed: int = 0) -> None:
        super().__init__(inner)
        self.faults = faults
        self._random = random.Random(seed)

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        await self._misbehave()
        return await self.inner.put(header, envelope)

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        await self._misbehave()
        header = await self.inner.get(key, into)
        if self._random.random() < self.faults.corrupt:
            into[HEADER_BYTES + self._random.randrange(header.length)] ^= 1
            await self.inner.delete([key])
            raise BlockCorrupt("injected: payload checksum does not match")
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        await self._misbehave()
        return await self.inner.delete(keys)

    async def _misbehave(self) -> None:
        if self.faults.delay:
            await asyncio.sleep(self.faults.delay)
        if self._random.random() < self.faults.unavailable:
            raise TierUnavailable("injected")
