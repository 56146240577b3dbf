"""Metrics of a node with several tenants: the node's own and, under the same names with the label ``tenant``, every tenant's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from kvstore.store import Store


class WholeNode(Collector):
    """Collected in the node's event loop. As many label values as there are tenants."""

    def __init__(self, own: CollectorRegistry, stores: Callable[[], Mapping[str, Store]]) -> None:
        """``stores`` by tenant."""
        self._own = own
        self._stores = stores

    def collect(self) -> Iterator[Metric]:
        stores = self._stores()
        yield from together(self._own, {name: store.metrics.registry for name, store in stores.items()})
        used = GaugeMetricFamily(
            "kvstore_tenant_used_bytes", "Room that a tenant's blocks take", labels=("tenant", "tier")
        )
        most = GaugeMetricFamily(
            "kvstore_tenant_quota_bytes",
            "What a tenant's blocks may take, or the tier's cap",
            labels=("tenant", "tier"),
        )
        for name, store in stores.items():
            for stats in (tier.stats() for tier in store.tiers):
                used.add_metric((name, stats.medium.value), stats.used_bytes)
                if stats.capacity_bytes is not None:
                    most.add_metric((name, stats.medium.value), stats.capacity_bytes)
        yield used
        yield most


def together(own: CollectorRegistry, others: Mapping[str, CollectorRegistry]) -> Iterator[Metric]:
    """The metrics of all registries, each once; samples of ``others`` have their registry's name as the label ``tenant``."""
    families = {metric.name: metric for metric in own.collect()}
    for tenant, registry in others.items():
        for metric in registry.collect():
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            family.samples += [
                Sample(one.name, {**one.labels, "tenant": tenant}, one.value, one.timestamp, one.exemplar)
                for one in metric.samples
            ]
    yield from families.values()
