"""The study's own arithmetic, and the product's policy on traces with a known best answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traces import Point, measure
from benchmarks.traces.baselines import LRU as BaselineLRU
from benchmarks.traces.baselines import ONLINE
from benchmarks.traces.plot import draw
from benchmarks.traces.replay import Cache, baseline_hits, keyed, policy_hits
from benchmarks.traces.tiers import run_tiers
from benchmarks.traces.trace import Trace, build
from benchmarks.traces.variants import agents, halves, scaled, scans, shuffled
from kvstore.policy.admission import Mode
from kvstore.policy.eviction import LRU
from kvstore.policy.reuse import Reuse, Traffic

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=30)


def traced(prompts: list[list[int]]) -> Trace:
    return build("made", [(float(i), ids, 512 * len(ids), 1) for i, ids in enumerate(prompts)])


@given(prompts, st.integers(5, 12))
def test_the_real_index_under_lru_hits_as_the_baseline_does(prompts: list[list[int]], capacity: int) -> None:
    trace = traced(prompts)
    assert policy_hits(keyed(trace), Cache(capacity, LRU())) == baseline_hits(trace, BaselineLRU(capacity))


@settings(max_examples=20)
@given(prompts, st.integers(2, 12))
def test_the_cache_holds_its_capacity_and_no_orphan(prompts: list[list[int]], capacity: int) -> None:
    trace, traffic = traced(prompts), Traffic(256)
    cache = Cache(capacity, Reuse(traffic))
    policy_hits(keyed(trace), cache, traffic)
    index = cache.index
    assert len(index) <= capacity
    for row in index.used():
        assert index.depth[row] == 0 or index.parent_row[row] >= 0


def test_conversations_survive_a_flood_of_prompts_that_never_return() -> None:
    trace = scans(900)
    capacity = trace.unique // 20
    traffic = Traffic()
    learnt = policy_hits(keyed(trace), Cache(capacity, Reuse(traffic)), traffic)
    best = max(baseline_hits(trace, policy(capacity)) for policy in ONLINE)
    assert learnt > best


def test_admission_writes_less_and_keeps_what_comes_back() -> None:
    source = keyed(scans(900))
    everything, enforced = run_tiers(source, Mode.OFF), run_tiers(source, Mode.ENFORCE)
    assert enforced.disk_writes < everything.disk_writes / 2
    assert enforced.hits > everything.hits * 0.9
    assert enforced.prefill_seconds_saved(512) > 0


def test_variants_keep_what_they_promise() -> None:
    trace = agents(200)
    first, second = halves(trace)
    assert len(first.requests) + len(second.requests) == len(trace.requests)
    assert scaled(trace, 10.0).requests[-1].time == pytest.approx(10 * trace.requests[-1].time)
    moved = shuffled(trace)
    assert moved.references == trace.references
    assert moved.unique == trace.unique
    assert [r.time for r in moved.requests] == sorted(r.time for r in moved.requests)


def test_a_point_knows_deficit_and_gap() -> None:
    point = Point("t", 0.1, {"lru": 10.0, "arc": 12.0}, belady=20.0, reuse=15.0, reuse_without_answers=11.0)
    assert point.deficit == -3.0
    assert point.gap_closed(point.reuse) == 0.5
    assert Point("t", 0.1, {"lru": 19.0}, 20.0, 19.0, 19.0).gap_closed(19.5) is None


def test_measures_and_draws(tmp_path: Path) -> None:
    point = measure(agents(60), 0.25)
    assert max(point.online.values()) <= point.belady
    draw(tmp_path / "images" / "plot.svg", [point])
    assert (tmp_path / "images" / "plot.svg").read_text().startswith("<svg")
