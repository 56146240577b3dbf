"""What a region's service shows to Prometheus."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from replication import metrics as module
from replication.copier import Copied, Outcome
from replication.cycle import Cycle, FlowReport
from replication.metrics import RegionMetrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def cycle(lag: float | None = 10.0, problem: str = "") -> Cycle:
    copied = Copied({Outcome.COPIED: 2, Outcome.GONE: 1}, 500_000_000)
    report = FlowReport("na", "na>eu", price_per_gb=0.02, copied=copied)
    return Cycle([report], {"na": problem} if problem else {}, {"na": lag}, buried=3)


def test_what_was_copied_and_what_it_cost_adds_up(registry: CollectorRegistry) -> None:
    metrics = RegionMetrics(registry)
    metrics.cycled(cycle())
    metrics.cycled(cycle())
    value = registry.get_sample_value
    assert value("kvstore_region_copied_bytes_total", {"source": "na"}) == 1e9
    assert value("kvstore_region_copied_blocks_total", {"source": "na", "outcome": "copied"}) == 4
    assert value("kvstore_region_copied_blocks_total", {"source": "na", "outcome": "gone"}) == 2
    assert value("kvstore_region_copy_cost_total", {"source": "na"}) == pytest.approx(1e9 / module.GB * 0.02)
    assert value("kvstore_region_deleted_blocks_total", {"reason": "tombstone"}) == 6


def test_lag_grows_between_rounds_and_is_told_by_who_replicates(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(time=lambda: 1000.0)
    monkeypatch.setattr(module, "time", now)
    metrics = RegionMetrics(registry)
    metrics.cycled(cycle(lag=10.0, problem="away"))
    now.time = lambda: 1060.0
    source = {"source": "na"}
    assert registry.get_sample_value("kvstore_region_lag_seconds", source) == 70.0
    assert registry.get_sample_value("kvstore_region_source_problem", source) == 1
    metrics.cycled(cycle(lag=None))
    assert registry.get_sample_value("kvstore_region_lag_seconds", source) is None, "it was never level"
    assert registry.get_sample_value("kvstore_region_source_problem", source) == 0
    metrics.standing_by()
    assert registry.get_sample_value("kvstore_region_source_problem", source) is None


def test_each_link_of_each_region_shows_whether_it_answers(registry: CollectorRegistry) -> None:
    metrics = RegionMetrics(registry)
    links: Any = SimpleNamespace(
        links=[SimpleNamespace(name="a", answers=True), SimpleNamespace(name="b", answers=False)]
    )
    metrics.watch("na", links)
    up = {link: registry.get_sample_value("kvstore_region_link_up", {"region": "na", "link": link}) for link in "ab"}
    assert up == {"a": 1, "b": 0}
