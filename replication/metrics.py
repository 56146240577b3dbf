"""What a region's service did and how it stands, as Prometheus metrics. Labels are names of the topology: a handful."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replication.cycle import Cycle
from replication.links import Links
from replication.manifest import Manifest
from replication.planner import GB


class RegionMetrics(Collector):
    """Counts of one process. Lag and problems are told by the process that holds the replicator's lease, as it last saw them.

    Called in the event loop of the duties; collected in any thread.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._links: dict[str, Links] = {}
        self._caught_up: dict[str, float | None] = {}
        self._problems: dict[str, bool] = {}
        self._away_since: dict[str, float] = {}
        self._copied_bytes = Counter(
            "kvstore_region_copied_bytes", "Bytes of blocks created from a source", ("source",), registry=registry
        )
        self._copied_blocks = Counter(
            "kvstore_region_copied_blocks",
            "Blocks of a source's hot set, by what became of them",
            ("source", "outcome"),
            registry=registry,
        )
        self._cost = Counter(
            "kvstore_region_copy_cost",
            "Price of the copied bytes by the topology, in its currency",
            ("source",),
            registry=registry,
        )
        self._deleted = Counter(
            "kvstore_region_deleted_blocks", "Blocks deleted from the bucket, by why", ("reason",), registry=registry
        )
        self._manifest_blocks = Gauge(
            "kvstore_region_manifest_blocks", "Blocks in the region's own manifest", registry=registry
        )
        self._manifest_bytes = Gauge(
            "kvstore_region_manifest_bytes", "Bytes of the blocks in the region's own manifest", registry=registry
        )
        self._published = Gauge(
            "kvstore_region_manifest_timestamp_seconds",
            "When the region's own manifest was published, seconds since the epoch",
            registry=registry,
        )
        registry.register(self)

    def watch(self, region: str, links: Links) -> None:
        """Show whether the links to a region's bucket answer."""
        self._links[region] = links

    def cycled(self, cycle: Cycle) -> None:
        """A round of the replicator that copied."""
        now = time.time()
        self._caught_up |= {source: None if lag is None else now - lag for source, lag in cycle.lag.items()}
        self._problems |= {source: source in cycle.problems for source in cycle.lag}
        self._away_since |= cycle.away_since
        for report in cycle.flows:
            copied = report.copied
            self._copied_bytes.labels(report.source).inc(copied.nbytes)
            self._cost.labels(report.source).inc(copied.nbytes / GB * report.price_per_gb)
            for outcome, blocks in copied.outcomes.items():
                self._copied_blocks.labels(report.source, outcome.value).inc(blocks)
        self.deleted("tombstone", cycle.buried)

    def standing_by(self) -> None:
        """Another process replicates: what this one knew of the sources grows old."""
        self._caught_up, self._problems, self._away_since = {}, {}, {}

    def published(self, manifest: Manifest) -> None:
        """The region's own manifest."""
        self._manifest_blocks.set(len(manifest.blocks))
        self._manifest_bytes.set(sum(block.nbytes for block in manifest.blocks))
        self._published.set(manifest.published)

    def deleted(self, reason: str, blocks: int) -> None:
        """Blocks that went for good; ``reason`` is one of a few words."""
        self._deleted.labels(reason).inc(blocks)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        now = time.time()
        lag = GaugeMetricFamily("kvstore_region_lag_seconds", "How far behind a source", labels=("source",))
        for source, caught_up in self._caught_up.items():
            if caught_up is not None:
                lag.add_metric((source,), max(now - caught_up, 0.0))
        yield lag
        problem = GaugeMetricFamily(
            "kvstore_region_source_problem", "1 while rounds with a source fall short", labels=("source",)
        )
        for source, falls_short in self._problems.items():
            problem.add_metric((source,), float(falls_short))
        yield problem
        away = GaugeMetricFamily(
            "kvstore_region_source_away_seconds",
            "For how long a source's bucket has not answered; 0 while it does",
            labels=("source",),
        )
        for source, since in self._away_since.items():
            away.add_metric((source,), max(now - since, 0.0) if since else 0.0)
        yield away
        up = GaugeMetricFamily("kvstore_region_link_up", "1 while the link answers", labels=("region", "link"))
        for region, links in list(self._links.items()):
            for link in links.links:
                up.add_metric((region, link.name), float(link.answers))
        yield up
