"""The simulator against reference values of public traces, and the baselines against brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.traces import TRACES
from benchmarks.traces.baselines import LRU as BaselineLRU
from benchmarks.traces.baselines import ONLINE, S3FIFO, Baseline, DecayedCount
from benchmarks.traces.belady import belady_hits
from benchmarks.traces.replay import baseline_hits
from benchmarks.traces.trace import Trace, build, load

REFERENCE = [
    ("mooncake-fast25/conversation_trace.jsonl", 0.02, BaselineLRU, 7.9),
    ("mooncake-fast25/conversation_trace.jsonl", 0.02, S3FIFO, 11.2),
    ("mooncake-fast25/conversation_trace.jsonl", 0.02, DecayedCount, 14.6),
    ("mooncake-fast25/conversation_trace.jsonl", 0.10, S3FIFO, 24.5),
    ("mooncake-fast25/synthetic_trace.jsonl", 0.05, BaselineLRU, 15.7),
    ("mooncake-fast25/synthetic_trace.jsonl", 0.10, S3FIFO, 26.3),
    ("mooncake-fast25/synthetic_trace.jsonl", 0.25, DecayedCount, 45.6),
    ("mooncake-fast25/conversation_trace.jsonl", 0.02, None, 31.4),
    ("mooncake-fast25/synthetic_trace.jsonl", 0.25, None, 62.6),
    ("ragpulse/0_trace.jsonl", 0.05, None, 18.0),
]


def loaded(file: str, cache: dict[str, Trace] = {}) -> Trace:  # noqa: B006
    path = TRACES / file
    if not path.exists():
        pytest.skip(f"no trace at {path}")
    if file not in cache:
        cache[file] = load(path)
    return cache[file]


@pytest.mark.parametrize(("file", "share", "policy", "percent"), REFERENCE)
def test_reference_hit_ratio(file: str, share: float, policy: type[Baseline] | None, percent: float) -> None:
    trace = loaded(file)
    capacity = int(trace.unique * share)
    hits = baseline_hits(trace, policy(capacity)) if policy else belady_hits(trace, capacity)
    assert round(100 * hits / trace.references, 1) == percent


def test_reference_footprint() -> None:
    trace = loaded("mooncake-fast25/synthetic_trace.jsonl")
    assert (trace.references, trace.unique) == (121_877, 43_924)


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=40)


def traced(prompts: list[list[int]]) -> Trace:
    return build("made", [(float(i), ids, 512 * len(ids), 1) for i, ids in enumerate(prompts)])


@given(prompts, st.integers(2, 12))
def test_no_policy_beats_belady_nor_the_ideal(prompts: list[list[int]], capacity: int) -> None:
    trace = traced(prompts)
    best = belady_hits(trace, capacity)
    assert best <= trace.references - trace.unique
    for policy in ONLINE:
        assert baseline_hits(trace, policy(capacity)) <= best


@given(prompts, st.integers(2, 12))
def test_baselines_hold_their_capacity(prompts: list[list[int]], capacity: int) -> None:
    trace = traced(prompts)
    for policy in ONLINE:
        cache = policy(capacity)
        baseline_hits(trace, cache)
        assert sum(block in cache for block in range(trace.unique)) <= capacity


@given(prompts)
def test_everything_hits_again_when_all_fits(prompts: list[list[int]]) -> None:
    trace = traced(prompts)
    for policy in (BaselineLRU, DecayedCount):
        assert baseline_hits(trace, policy(max(1, trace.unique))) == trace.references - trace.unique


def test_load_chains_ragpulse_by_position(tmp_path: Path) -> None:
    path = tmp_path / "rag.jsonl"
    row = '{"timestamp": "%s", "input_length": 9, "output_length": 1, "hash_ids": {"sys_prompt": [1], "passages_ids": [%s]}}\n'
    path.write_text(row % (2, "3, 2") + "\n" + row % (1, "2, 3"))
    trace = load(path)
    assert [request.time for request in trace.requests] == [1.0, 2.0]
    assert trace.unique == 5
    assert trace.parent.tolist() == [-1, 0, 1, 0, 3]
