"""What the planner decides, by table and for any input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policy.planner import Decision, Prefetch, Reason, Request, Run, Speed, Wait, plan
from kvstore.policy.queueing import EMPTY, Line, Work
from kvstore.tiers.base import Medium

SIZE, TOKENS = 8 << 20, 64
H100 = {Medium.HOST: Speed(0.001, 50e9), Medium.DISK: Speed(0.001, 2e9), Medium.OBJECT: Speed(0.03, 0.5e9)}
FOREVER = Wait(Prefetch.WAIT_COMPLETE)


def run(medium: Medium, blocks: int) -> Run:
    return Run(medium, blocks, blocks * SIZE)


def request(*runs: Run, more: int = 0, line: Line = EMPTY) -> Request:
    return Request(runs, 0, (sum(r.blocks for r in runs) + more) * TOKENS, TOKENS, line)


def prefill(start: int, tokens: int) -> float:
    """8B on an H100: 4 GB/s of KV when short."""
    return 0.005 + 33e-6 * tokens * (1 + (start + tokens / 2) / 32_000)


HOST, DISK, OBJECT = Medium.HOST, Medium.DISK, Medium.OBJECT


@pytest.mark.parametrize(
    ("asked", "blocks", "reason"),
    [
        (request(), 0, Reason.NOT_STORED),
        (request(run(HOST, 100)), 100, Reason.LOAD),
        (request(run(DISK, 100)), 0, Reason.RECOMPUTE),
        (request(run(DISK, 2000)), 2000, Reason.LOAD),  # long prompts are dear to compute
        (request(run(OBJECT, 2000)), 0, Reason.RECOMPUTE),
        (request(run(HOST, 50), run(DISK, 50)), 50, Reason.SPLIT),
        (request(run(HOST, 50), run(OBJECT, 500)), 50, Reason.SPLIT),
        (request(run(DISK, 100), line=Line(waiting=4)), 100, Reason.LOAD),  # the others wait for what is computed
        (request(run(DISK, 100), line=Line(rate=2, busy=0.8)), 100, Reason.LOAD),  # and so will those who come
        (request(run(DISK, 2000), line=Line(coming=(Work(15, 1),))), 2000, Reason.LOAD),
    ],
)
def test_decisions(asked: Request, blocks: int, reason: Reason) -> None:
    decision = plan(asked, H100, prefill, FOREVER)
    assert (decision.blocks, decision.reason) == (blocks, reason)


def test_a_split_beats_loading_all_and_computing_all() -> None:
    decision = plan(request(run(HOST, 50), run(OBJECT, 500)), H100, prefill, FOREVER)
    assert decision.chosen is not None
    assert decision.load_all is not None
    assert decision.recompute_all is not None
    assert decision.chosen < min(decision.load_all, decision.recompute_all)


@pytest.mark.parametrize("known", [{}, {HOST: H100[HOST]}])
def test_what_is_not_measured_is_loaded(known: Mapping[Medium, Speed]) -> None:
    decision = plan(request(run(DISK, 100)), known, prefill, FOREVER)
    assert (decision.blocks, decision.reason) == (100, Reason.UNMEASURED)
    assert plan(request(run(DISK, 100)), H100, None, FOREVER).blocks == 100


def test_a_queue_counts_as_bytes_ahead() -> None:
    asked = request(run(DISK, 2000))
    busy = {**H100, DISK: replace(H100[DISK], queued_bytes=100 << 30)}
    assert plan(asked, busy, prefill, FOREVER).reason is Reason.RECOMPUTE


def test_best_effort_takes_what_is_in_the_arena_and_fetches_the_rest_for_later() -> None:
    decision = plan(request(run(HOST, 10), run(DISK, 2000)), H100, prefill, Wait(Prefetch.BEST_EFFORT))
    assert (decision.blocks, decision.reason) == (10, Reason.NOT_IN_ARENA)
    assert decision.background == 2000
    unmeasured = plan(request(run(HOST, 10), run(DISK, 20)), H100, None, Wait(Prefetch.BEST_EFFORT))
    assert (unmeasured.blocks, unmeasured.background) == (10, 20)


def test_timeout_grants_a_base_and_more_for_each_token() -> None:
    asked = request(run(DISK, 2000))
    assert plan(asked, H100, prefill, Wait(Prefetch.TIMEOUT, 1, 0.25)).reason is Reason.LOAD
    late = plan(asked, H100, prefill, Wait(Prefetch.TIMEOUT, 1, 0.01))
    assert (late.blocks, late.reason) == (0, Reason.TOO_LATE)
    unmeasured = plan(asked, {}, None, Wait(Prefetch.TIMEOUT, 1, 0.25))
    assert unmeasured.patience.seconds(2000) == 1 + 0.25 * 2000 * TOKENS / 1024


def test_a_block_may_take_what_computing_it_would() -> None:
    asked = request(run(HOST, 100))
    patience = plan(asked, H100, prefill, FOREVER).patience
    whole = prefill(0, 6400)
    assert patience.seconds(50) < whole
    assert patience.seconds(100) <= 1.05 * whole + H100[HOST].start() + 0.01


def test_slow_tiers_are_not_read_ahead_for_long() -> None:
    decision = plan(request(run(OBJECT, 5000)), H100, prefill, FOREVER)
    assert decision.blocks == 0
    assert 0 < decision.background * SIZE / 0.5e9 <= 10


lines = st.builds(
    Line,
    waiting=st.floats(0, 20),
    backlog=st.floats(0, 100),
    rate=st.floats(0, 100),
    busy=st.floats(0, 1),
    coming=st.lists(st.builds(Work, st.floats(0, 100), st.floats(0, 100)), max_size=3).map(sorted).map(tuple),
)
speeds = st.builds(
    Speed,
    latency=st.floats(0, 0.2),
    bandwidth=st.floats(1e7, 1e11),
    window=st.integers(1, 64),
    queued_bytes=st.integers(0, 1 << 34),
)
waits = st.builds(Wait, st.sampled_from(Prefetch), st.floats(0, 10), st.floats(0, 10))
requests = st.builds(
    lambda runs, start, more, line: Request(
        tuple(Run(medium, blocks, blocks * SIZE) for medium, blocks in runs),
        start * TOKENS,
        (start + sum(blocks for _, blocks in runs)) * TOKENS + more,
        TOKENS,
        line,
    ),
    st.lists(st.tuples(st.sampled_from(Medium), st.integers(1, 500)), max_size=5),
    st.integers(0, 500),
    st.integers(0, 10_000),
    lines,
)
tables = st.fixed_dictionaries(dict.fromkeys(Medium, speeds))


def decide(asked: Request, table: Mapping[Medium, Speed], wait: Wait) -> Decision:
    return plan(asked, table, prefill, wait)


@given(requests, tables, waits)
def test_a_plan_stays_within_what_was_found(asked: Request, table: Mapping[Medium, Speed], wait: Wait) -> None:
    decision = decide(asked, table, wait)
    assert 0 <= decision.blocks <= decision.found == asked.found
    assert 0 <= decision.background <= decision.found - decision.blocks
    assert decision.patience.seconds(decision.blocks) >= 0
    ends = [0]
    for each in asked.runs:
        ends.append(ends[-1] + each.blocks)
    assert decision.blocks in ends


@given(requests, tables)
def test_a_plan_is_never_worse_than_loading_all_or_computing_all(asked: Request, table: Mapping[Medium, Speed]) -> None:
    decision = decide(replace(asked, line=EMPTY), table, FOREVER)
    if decision.found:
        assert decision.chosen is not None
        assert decision.load_all is not None
        assert decision.recompute_all is not None
        assert decision.chosen <= min(decision.load_all, decision.recompute_all) * (1 + 1e-9)


@given(requests, tables, st.sampled_from(Medium), st.floats(1, 100))
def test_a_faster_tier_never_makes_a_request_slower(
    asked: Request, table: Mapping[Medium, Speed], medium: Medium, factor: float
) -> None:
    asked = replace(asked, line=EMPTY)
    before = decide(asked, table, FOREVER)
    faster = replace(table[medium], bandwidth=table[medium].bandwidth * factor)
    after = decide(asked, {**table, medium: faster}, FOREVER)
    if before.chosen is not None and after.chosen is not None:
        assert after.chosen <= before.chosen * (1 + 1e-9)
