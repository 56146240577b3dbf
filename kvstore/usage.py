"""What engines ask of a node and what they get, in tokens and seconds, as Prometheus metrics and spans.

An engine that cannot admit a request yet asks for it again and again: within ``SAME_REQUEST_SECONDS`` of the last time it
counts once, with what was found first. Owned by the node's event loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from kvstore import tracing
from kvstore.demand import SAME_REQUEST_SECONDS
from kvstore.identity import BlockKey
from kvstore.leases import Delivery
from kvstore.node.api import Miss
from kvstore.tiers.base import Medium

log = structlog.get_logger(__name__)

MOST_REQUESTS = 4096

_LOOKUP_BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_LOAD_BUCKETS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1, 2, 5, 10)

_DAMAGE = (Miss.CORRUPT, Miss.UNAVAILABLE)
_SLOWEST = tuple(Medium)[::-1]


class Usage:
    """Counts requests, and times lookups and loads. Label values are enum values: their number is bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._recent: dict[tuple[object, object], float] = {}
        self._lookups = Counter("kvstore_lookups", "Lookups, by what they found", ("outcome",), registry=registry)
        self._lookup_seconds = Histogram(
            "kvstore_lookup_seconds", "Time that the node took for a lookup", registry=registry, buckets=_LOOKUP_BUCKETS
        )
        self._requests = Counter("kvstore_requests", "Requests of engines that were looked up", registry=registry)
        self._asked = Counter(
            "kvstore_asked_tokens", "Tokens that requests asked for: those the engine did not have", registry=registry
        )
        self._found = Counter(
            "kvstore_found_tokens",
            "Tokens found for requests, by the fastest tier that held them",
            ("tier",),
            registry=registry,
        )
        self._observed = Counter(
            "kvstore_observed_tokens",
            "Tokens that a tier would have added to what was found for requests, were it not only observed",
            ("tier",),
            registry=registry,
        )
        self._offered = Counter(
            "kvstore_offered_tokens", "Tokens that engines were told to load for requests", registry=registry
        )
        self._spared = Counter(
            "kvstore_spared_prefill_seconds",
            "Prefill of the offered tokens, at the speed that their engines reported",
            registry=registry,
        )
        self._load_seconds = Histogram(
            "kvstore_load_seconds",
            "Time to bring the blocks of one acquire to the arena, by the slowest tier they came from",
            ("tier",),
            registry=registry,
            buckets=_LOAD_BUCKETS,
        )

    def first(self, caller: object, name: str, keys: Sequence[BlockKey]) -> bool:
        """Whether this lookup stands for a new request: one of that ``name`` or, without a name, of that last key."""
        now = time.monotonic()
        mark = (caller, name or (keys[-1] if keys else None))
        before = self._recent.pop(mark, -SAME_REQUEST_SECONDS)
        self._recent[mark] = now
        if len(self._recent) > MOST_REQUESTS:
            del self._recent[next(iter(self._recent))]
        return now - before >= SAME_REQUEST_SECONDS

    def count_request(
        self, asked: int, runs: Sequence[tuple[Medium, int]], offered: int, block_tokens: int, spared: float
    ) -> None:
        """A new request: blocks asked for, found and offered, and the seconds of prefill that the offered ones spare."""
        self._requests.inc()
        self._asked.inc(asked * block_tokens)
        for medium, blocks in runs:
            self._found.labels(medium.value).inc(blocks * block_tokens)
        self._offered.inc(offered * block_tokens)
        self._spared.inc(spared)

    def count_observed(self, runs: Sequence[tuple[Medium, int]], block_tokens: int) -> None:
        """Of a new request: what tiers would have added that are only observed."""
        for medium, blocks in runs:
            self._observed.labels(medium.value).inc(blocks * block_tokens)

    @contextmanager
    def lookup(self, parent: str, request: str, asked: int) -> Iterator[Lookup]:
        """Around a lookup of so many blocks; ``parent`` as for ``tracing.span``."""
        started = time.perf_counter()
        with tracing.span("node lookup", parent, request=request, blocks=asked) as span:
            seen = Lookup()
            yield seen
            span.set(found=seen.found)
            self._lookup_seconds.observe(time.perf_counter() - started, tracing.exemplar())
            log.debug("looked up", request=request, blocks=asked, found=seen.found)
        outcome = "hit" if seen.found >= asked else "partial" if seen.found else "miss"
        self._lookups.labels(outcome).inc()

    @contextmanager
    def load(self, parent: str, keys: Sequence[BlockKey]) -> Iterator[Load]:
        """Around an acquire of ``keys``."""
        started = time.perf_counter()
        with tracing.span("node acquire", parent, blocks=len(keys), first=keys[0] if keys else b"") as span:
            load = Load()
            yield load
            if (delivery := load.delivery) is None:
                return
            delivered, miss = len(delivery.media), delivery.miss
            span.set(delivered=delivered, miss=miss.value if miss else "")
            if delivered:
                slowest = next(medium for medium in _SLOWEST if medium in delivery.media)
                self._load_seconds.labels(slowest.value).observe(time.perf_counter() - started, tracing.exemplar())
            if miss in _DAMAGE:
                log.warning("block not delivered", block=keys[delivered].hex(), reason=miss.value)


class Lookup:
    """To be told what was found."""

    found = 0
    """Blocks."""


class Load:
    """To be told what came."""

    delivery: Delivery | None = None
