"""Counters of the node, as Prometheus metrics in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector


class StoreMetrics:
    """What the store pipeline counts. Label values are enum values, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvstore_{name}", text, labels, registry=self.registry)

        self.looked_up = counter("looked_up_blocks", "Blocks asked for by lookups")
        self.found = counter("found_blocks", "Blocks found by lookups, by the fastest tier that held them", "tier")
        self.delivered = counter("delivered_blocks", "Blocks leased to clients, by the tier they came from", "tier")
        self.missed = counter("missed_blocks", "Blocks asked for and not delivered, by reason", "reason")
        self.reserved = counter("reserved_blocks", "Blocks offered by clients for saving, by outcome", "outcome")
        self.published = counter("published_blocks", "Blocks saved by clients and published")
        self.aborted = counter("aborted_blocks", "Reservations given up before they were committed")
        self.written = counter("written_blocks", "Blocks written down to a slower tier, by outcome", "tier", "outcome")
        self.judged = counter(
            "judged_blocks", "Blocks offered to a slower tier, by what admission said", "tier", "reason"
        )
        self.dropped = counter("dropped_blocks", "Blocks not written down because the queue was full", "tier")

    def snapshot(self) -> dict[str, float]:
        """Every sample as ``{"name{label=value}": value}``, without the creation times."""
        samples = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                    samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples


def exposition(metrics: Collector, exemplars: bool) -> bytes:
    """Prometheus' text format, or OpenMetrics, which has exemplars."""
    render = openmetrics.generate_latest if exemplars else generate_latest
    return bytes(render(metrics))
