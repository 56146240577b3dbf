"""The state of a node, as Prometheus metrics that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import kvstore
from kvstore.store import Store
from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import Breaker, BreakerState, Wrapped
from kvstore.warmth import read_warmth


class NodeGauges(Collector):
    """Tiers, queues, breakers, clients and warmth of one node. Collected in the node's event loop."""

    def __init__(
        self, store: Store, clients: Sized, pins: Sized, draining: Callable[[], bool], directory: Path
    ) -> None:
        """``clients`` are those connected, ``pins`` the pinned blocks; ``directory`` is ``node.directory``."""
        self._store = store
        self._clients = clients
        self._pins = pins
        self._draining = draining
        self._directory = directory

    def describe(self) -> Iterable[Metric]:
        """Nothing to check for duplicates: that would read everything at the start."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield _gauge("kvstore_build_info", "1; the version is a label", "version", {kvstore.__version__: 1})
        yield GaugeMetricFamily("kvstore_clients", "Connected clients: two an engine of one rank", len(self._clients))
        yield GaugeMetricFamily("kvstore_pinned_blocks", "Blocks that operators pinned", len(self._pins))
        yield GaugeMetricFamily("kvstore_draining", "1 while the node stops and takes no saves", self._draining())
        yield from self._tiers()
        yield from self._queues()
        yield from self._warmth()

    def _tiers(self) -> Iterator[Metric]:
        stats = {tier.medium.value: tier.stats() for tier in self._store.tiers}
        yield _gauge("kvstore_tier_blocks", "Blocks held", "tier", {t: s.blocks for t, s in stats.items()})
        yield _gauge("kvstore_tier_used_bytes", "Room taken", "tier", {t: s.used_bytes for t, s in stats.items()})
        capacity = {t: s.capacity_bytes for t, s in stats.items() if s.capacity_bytes is not None}
        yield _gauge("kvstore_tier_capacity_bytes", "Hard cap, of tiers that have one", "tier", capacity)
        yield _counter("kvstore_tier_evicted_blocks", "Blocks evicted", {t: s.evicted for t, s in stats.items()})
        yield _counter("kvstore_tier_refused_blocks", "Blocks without room", {t: s.refused for t, s in stats.items()})
        bad = {t: s.quarantined for t, s in stats.items()}
        yield _counter("kvstore_tier_bad_blocks", "Blocks whose bytes did not verify, dropped or set aside", bad)
        states = GaugeMetricFamily(
            "kvstore_breaker_state", "1 for the state of the tier's circuit breaker", labels=("tier", "state")
        )
        for tier in self._store.tiers:
            if (breaker := _breaker(tier)) is not None:
                for state in BreakerState:
                    states.add_metric((tier.medium.value, state.value), float(breaker.state is state))
        yield states

    def _queues(self) -> Iterator[Metric]:
        queued = {medium.value: nbytes for medium, nbytes in self._store.queued_bytes.items()}
        fill = {medium.value: self._store.pressure(medium) for medium in self._store.queued_bytes}
        yield _gauge("kvstore_queue_bytes", "Bytes that wait to be written to the tier", "tier", queued)
        yield _gauge("kvstore_queue_fill_ratio", "Share of the tier's write queue that is taken", "tier", fill)

    def _warmth(self) -> Iterator[Metric]:
        warmth = read_warmth(self._directory)
        if warmth is not None:  # a node that was never warmed has no warmth
            yield GaugeMetricFamily("kvstore_warm_ratio", "Share of the last warm-up that is here", warmth.share)
            text = "When the last warm-up made progress, seconds since the epoch"
            yield GaugeMetricFamily("kvstore_warm_updated_timestamp_seconds", text, warmth.updated)


def _breaker(tier: Tier) -> Breaker | None:
    while isinstance(tier, Wrapped):
        if isinstance(tier, Breaker):
            return tier
        tier = tier.inner
    return None


def _gauge(name: str, text: str, label: str, values: dict[str, int] | dict[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, number in values.items():
        family.add_metric((value,), number)
    return family


def _counter(name: str, text: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=("tier",))
    for value, number in values.items():
        family.add_metric((value,), number)
    return family
