"""Every tenant's metrics for whoever runs the node: those of its pipeline, as ``kvstore_tenant_...`` with the tenant's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from kvstore.store import Store

_OWN, _SHOWN = "kvstore_", "kvstore_tenant_"


class TenantMetrics(Collector):
    """Collected in the node's event loop. As many label values as there are tenants."""

    def __init__(self, stores: Callable[[], Mapping[str, Store]]) -> None:
        """``stores`` by tenant."""
        self._stores = stores

    def describe(self) -> Iterable[Metric]:
        """Nothing to check for duplicates: that would read everything at the start."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stores = self._stores()
        used = GaugeMetricFamily(f"{_SHOWN}used_bytes", "Room that a tenant's blocks take", labels=("tenant", "tier"))
        most = GaugeMetricFamily(
            f"{_SHOWN}quota_bytes", "What a tenant's blocks may take, or the tier's cap", labels=("tenant", "tier")
        )
        for name, store in stores.items():
            for stats in (tier.stats() for tier in store.tiers):
                used.add_metric((name, stats.medium.value), stats.used_bytes)
                if stats.capacity_bytes is not None:
                    most.add_metric((name, stats.medium.value), stats.capacity_bytes)
        yield used
        yield most
        yield from together({name: store.metrics.registry for name, store in stores.items()})


def together(registries: Mapping[str, CollectorRegistry]) -> Iterator[Metric]:
    """The metrics of all registries, each once, with the name of the registry as the label ``tenant``."""
    families: dict[str, Metric] = {}
    for tenant, registry in registries.items():
        for metric in registry.collect():
            name = _renamed(metric.name)
            family = families.setdefault(name, Metric(name, metric.documentation, metric.type, metric.unit))
            family.samples += [
                Sample(_renamed(one.name), {**one.labels, "tenant": tenant}, one.value, one.timestamp, one.exemplar)
                for one in metric.samples
            ]
    yield from families.values()


def _renamed(name: str) -> str:
    return _SHOWN + name.removeprefix(_OWN)
