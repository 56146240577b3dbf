from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.envelope import Header
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.admission import (
    ADMITTED,
    AdmissionPolicy,
    Candidate,
    LossBudget,
    Mode,
    Reason,
    Target,
    Thresholds,
    judge,
)
from kvstore.policy.eviction import LRU, eviction_order
from kvstore.policy.pins import LONGEST, PinnedLast, Pins
from kvstore.policy.reuse import Traffic
from kvstore.tiers.base import Medium


def chain(name: str, blocks: int) -> list[BlockKey]:
    return [BlockKey(hashlib.blake2b(f"{name}/{i}".encode(), digest_size=16).digest()) for i in range(blocks)]


ONCE, TWICE = Candidate(chance=0.5, least_chance=0.4), Candidate(sightings=2, chance=0.0, least_chance=0.4)
UNLIKELY = Candidate(sightings=1, chance=0.01, least_chance=0.02)

TABLE = [
    (Target.HOST, UNLIKELY, 1.0, Reason.ALWAYS),
    (Target.DISK, ONCE, 0.0, Reason.LIKELY),
    (Target.DISK, ONCE, 0.49, Reason.LIKELY),
    (Target.DISK, ONCE, 0.5, Reason.UNDER_PRESSURE),
    (Target.DISK, UNLIKELY, 0.0, Reason.UNLIKELY),
    (Target.DISK, TWICE, 0.0, Reason.SEEN_AGAIN),
    (Target.DISK, TWICE, 1.0, Reason.SEEN_AGAIN),
    (Target.DISK, Candidate(chance=0.0, least_chance=0.4, pinned=True), 1.0, Reason.PINNED),
    (Target.OBJECT, ONCE, 0.0, Reason.SEEN_ONCE),
    (Target.OBJECT, TWICE, 1.0, Reason.SEEN_AGAIN),
    (Target.OBJECT, Candidate(pinned=True), 0.0, Reason.PINNED),
    (Target.WAN, Candidate(sightings=9, hits=2.9), 0.0, Reason.COLD),
    (Target.WAN, Candidate(hits=3.0), 0.0, Reason.HOT),
    (Target.WAN, Candidate(pinned=True), 0.0, Reason.PINNED),
]


@pytest.mark.parametrize(("target", "candidate", "pressure", "reason"), TABLE)
def test_rule(target: Target, candidate: Candidate, pressure: float, reason: Reason) -> None:
    assert judge(target, candidate, pressure, Thresholds()) is reason


def test_every_reason_of_the_rule_is_in_the_table() -> None:
    assert {reason for *_, reason in TABLE} == set(Reason) - {Reason.POLICY_OFF}


def test_targets_are_named_like_media() -> None:
    written = set(Medium) - {Medium.REMOTE}
    assert {medium.value for medium in written} == {target.value for target in Target} - {"wan"}


def offered(policy: AdmissionPolicy, traffic: Traffic, keys: list[BlockKey], now: float, target: Target) -> list[bool]:
    traffic.observe(keys, now)
    return [decision.admit for decision in policy.admit(target, keys, now)]


def test_modes() -> None:
    for mode, first, counted in ((Mode.OFF, True, 0), (Mode.OBSERVE, True, 3), (Mode.ENFORCE, False, 3)):
        traffic = Traffic(1 << 10)
        policy = AdmissionPolicy(traffic, mode=mode)
        assert offered(policy, traffic, chain("a", 3), 1.0, Target.OBJECT) == [first] * 3
        assert policy.decisions.total() == counted
        assert policy.decisions[Target.OBJECT, Reason.SEEN_ONCE] == counted
        assert offered(policy, traffic, chain("a", 3), 2.0, Target.OBJECT) == [True] * 3


def test_a_refused_block_is_recognised_when_it_comes_again() -> None:
    traffic = Traffic(1 << 10)
    policy = AdmissionPolicy(traffic, mode=Mode.ENFORCE)
    prompt = chain("a", 3)
    assert offered(policy, traffic, prompt + chain("x", 2), 1.0, Target.OBJECT) == [False] * 5
    assert offered(policy, traffic, prompt + chain("y", 2), 2.0, Target.OBJECT) == [True] * 3 + [False] * 2


def test_learns_which_prompts_do_not_come_back() -> None:
    """Long prompts never return, short ones always do: only the short ones are written."""
    traffic = Traffic(1 << 14)
    policy = AdmissionPolicy(traffic, mode=Mode.ENFORCE, thresholds=Thresholds(horizon=60.0))
    for round_ in range(100):
        for turn in range(2):
            traffic.observe(chain(f"short {round_}", 3), round_ * 20.0 + turn * 10)
        traffic.observe(chain(f"long {round_}", 40), round_ * 20.0 + 11)
    assert all(offered(policy, traffic, chain("short new", 3), 2001.0, Target.DISK)[:2])
    assert not any(offered(policy, traffic, chain("long new", 40), 2002.0, Target.DISK))


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=200), st.integers(0, 1000), st.floats(0.0, 1.0))
def test_what_is_given_up_stays_within_its_share_of_the_hits(chances: list[float], hits: int, share: float) -> None:
    budget = LossBudget(share)
    budget.offered(np.array(chances), hits)
    given_up = [chance for chance in chances if chance < budget.least_chance]
    assert sum(given_up) <= share * hits + 1e-6
    assert all(chance < 0.5 for chance in given_up)


def test_without_hits_nothing_is_given_up() -> None:
    budget = LossBudget(0.05)
    budget.offered(np.array([0.001, 0.5]), 0)
    assert budget.least_chance <= 0.001


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=30), st.sampled_from(list(Target))
)
def test_no_block_is_admitted_without_its_ancestors(requests: list[tuple[int, int]], target: Target) -> None:
    traffic = Traffic(1 << 10)
    policy = AdmissionPolicy(traffic, mode=Mode.ENFORCE)
    for now, (name, blocks) in enumerate(requests):
        keys = chain(f"p{name}", blocks)
        traffic.observe(keys, float(now))
        decisions = policy.admit(target, keys, float(now), hits=[3.0 - i for i in range(blocks)])
        assert [d.admit for d in decisions] == sorted((d.admit for d in decisions), reverse=True)
        assert all(d.admit == (d.reason in ADMITTED) for d in decisions)


def test_pins_end_by_themselves() -> None:
    pins = Pins(most=4)
    keys = chain("a", 3)
    assert pins.pin(keys, until=50.0, now=0.0) == 3
    assert pins.pin(keys[:1], until=10.0, now=0.0) == 1, "a shorter pin does not shorten one"
    assert pins.hold(keys + chain("b", 1), 49.0) == [True, True, True, False]
    assert pins.hold(keys, 50.0) == [False] * 3
    assert pins.pin(chain("c", 4), until=1e12, now=60.0) == 4
    assert pins.pin(chain("d", 1), until=1e12, now=60.0) == 0, "full"
    assert pins.hold(chain("c", 1), 60.0 + LONGEST) == [False]
    assert pins.unpin(chain("c", 4), 60.0) == 4
    assert len(pins) == 0


def test_pinned_blocks_go_last_but_go() -> None:
    index, pins = BlockIndex(), Pins()
    for number, key in enumerate(chain("a", 3)):
        index.add(Header(key=key, namespace=bytes(16), index=0, tokens=64, length=9, crc=0), number, float(number))
    pins.pin(chain("a", 1), until=100.0, now=0.0)
    policy = PinnedLast(LRU(), pins)
    assert eviction_order(index, policy, index.used(), 50.0).tolist() == [1, 2, 0]
    assert eviction_order(index, policy, index.used(), 100.0).tolist() == [0, 1, 2]
    assert len(policy.values(index, np.zeros(0, dtype=np.intp), 0.0)) == 0
