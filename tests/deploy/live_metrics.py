"""The metrics of a real node and of a real regional service, as their registries tell them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvstore.config import load
from kvstore.testing.node import RunningNode
from kvstore.testing.tenants import prompt_of, save, tenant_site
from kvstore.warmth import WarmState, Warmth, write_warmth
from replication.keys import public_text
from replication.service import Pace, serve
from replication.site import Site

TOPOLOGY = """
[regions.na]
url = "file://{folder}/na"
public_key = "{key}"
[regions.eu]
url = "file://{folder}/b"
[[flows]]
from = "na"
to = ["eu"]
"""


@dataclass(frozen=True)
class Family:
    """A metric by the name that queries use."""

    kind: str
    text: str
    labels: frozenset[str]
    """Those that its samples have; empty while it has none."""


@cache
def node_metrics() -> dict[str, Family]:
    """Of a node with every tier, a catalog and other regions to read, which was warmed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_warmth(folder, Warmth(state=WarmState.DONE, started=1.0, updated=2.0))
        topology = folder / "regions.toml"
        topology.write_text(TOPOLOGY.format(folder=folder, key=public_text(Ed25519PrivateKey.generate().public_key())))
        places = [f"object.url=file://{folder}/b", f"catalog.url=sqlite://{folder}/c.db"]
        regions = ["region.name=eu", f"region.topology={topology}", "remote.mode=enforce"]
        with RunningNode(folder, *places, *regions) as running:
            return families(running.node.store.metrics.registry.collect())


@cache
def tenant_metrics() -> dict[str, Family]:
    """What a node has only with a tenant book."""
    with tenant_site("acme") as site, site.running() as running:
        with site.engine("acme") as engine, site.operator(running) as operator:
            save(engine, prompt_of(1))
            text = operator.call("metrics").decode()
        found = families(text_string_to_metric_families(text))
        return {name: family for name, family in found.items() if name.startswith("kvstore_tenant_")}


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
