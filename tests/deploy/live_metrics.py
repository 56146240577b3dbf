"""The metrics of a real node and of a real regional service, as their registries tell them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from kvstore.config import load
from kvstore.testing.node import RunningNode
from kvstore.warmth import WarmState, Warmth, write_warmth
from replication.service import Pace, serve
from replication.site import Site


@dataclass(frozen=True)
class Family:
    """A metric by the name that queries use."""

    kind: str
    text: str
    labels: frozenset[str]
    """Those that its samples have; empty while it has none."""


@cache
def node_metrics() -> dict[str, Family]:
    """Of a node with every tier and a catalog, which was warmed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_warmth(folder, Warmth(state=WarmState.DONE, started=1.0, updated=2.0))
        with RunningNode(folder, f"object.url=file://{folder}/b", f"catalog.url=sqlite://{folder}/c.db") as running:
            return families(running.node.store.metrics.registry.collect())


@cache
def region_metrics() -> dict[str, Family]:
    """Of a region's service."""
    registry = CollectorRegistry()

    async def run(folder: str) -> None:
        places = [f"object.url=file://{folder}/b", f"catalog.url=sqlite://{folder}/c.db", "object.bytes=1GiB"]
        stop = asyncio.Event()
        site = Site(load(None, places, environ={}).config)
        service = asyncio.create_task(serve(site, None, stop, registry, Pace(evict=0.05)))
        while not registry.get_sample_value("kvstore_region_rounds_total", {"duty": "evictor", "outcome": "done"}):
            await asyncio.sleep(0.02)
            assert not service.done()
        stop.set()
        await service

    with TemporaryDirectory() as folder:
        asyncio.run(run(folder))
        return families(registry.collect())


def families(metrics: Iterable[Metric]) -> dict[str, Family]:
    """By name; the creation times and the buckets of histograms are left out."""
    found = {}
    for metric in metrics:
        if metric.name.endswith("_created"):
            continue
        labels = frozenset(label for sample in metric.samples for label in sample.labels) - {"le"}
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        found[name] = Family(metric.type, metric.documentation, labels)
    return found
