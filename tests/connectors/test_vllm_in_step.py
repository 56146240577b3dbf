"""When a load is part of the step that computes with it, and what is held in memory for it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connectors.vllm.in_step import IN_STEP_SECONDS, Holder, Situation, fits
from connectors.vllm.plan import Told
from connectors.vllm.timing import Timing
from kvstore.errors import NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import NewBlock
from kvstore.testing.inprocess import InProcessNode
from kvstore.tiers.base import Medium

NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=1,
    layout="opaque:test",
)  # fmt: skip
KEYS = tuple(BlockKey(number.to_bytes(16, "big")) for number in range(6))
ALONE = Situation(others=0, seconds=0.01, ready=True, windowed=False)
READY = Told(ready=Counter({1: 2}))


@pytest.mark.parametrize(
    ("media", "now", "expected"),
    [
        ({Medium.HOST}, ALONE, True),
        ({Medium.HOST}, Situation(0, IN_STEP_SECONDS, True, False), True),
        ({Medium.HOST}, Situation(0, IN_STEP_SECONDS * 1.01, True, False), False),
        ({Medium.HOST}, Situation(1, 0.01, True, False), False),
        ({Medium.HOST}, Situation(0, 0.01, False, False), False),
        ({Medium.HOST}, Situation(0, 0.01, True, True), False),
        ({Medium.HOST, Medium.DISK}, ALONE, False),
        ({Medium.OBJECT}, ALONE, False),
        ({Medium.REMOTE}, ALONE, False),
        (set(), ALONE, False),
    ],
)
def test_only_memory_for_a_lone_request_is_loaded_in_the_step(
    media: set[Medium], now: Situation, expected: bool
) -> None:
    assert fits(media, now) is expected


@pytest.fixture
def node() -> InProcessNode:
    node = InProcessNode(1 << 20)
    node.open_namespace(NAMESPACE, 64)
    node.reserve(NAMESPACE, [NewBlock(key, NO_PARENT, 0) for key in KEYS[:5]])
    node.commit(KEYS[:5])
    return node


@pytest.fixture
def holder(node: InProcessNode) -> Holder:
    link: Any = SimpleNamespace(client=node, lost=lambda: None)
    return Holder(link, ranks=2)


def leases(node: InProcessNode) -> int:
    return sum(slot.leases for slot in node._slots.values())


def test_nothing_is_held_before_every_rank_is_prepared(node: InProcessNode, holder: Holder) -> None:
    assert not holder.ready
    holder.heard(Told(ready=Counter({1: 1})))
    assert not holder.ready
    assert holder.hold("r", KEYS[:2]) is None
    assert leases(node) == 0
    holder.heard(Told(ready=Counter({1: 1})))
    assert holder.ready
    slots = holder.hold("r", KEYS[:2])
    assert slots is not None
    assert slots.epoch == node.epoch
    assert leases(node) == len(slots.offsets) == 2


def test_a_restarted_node_is_another_one(node: InProcessNode) -> None:
    link: Any = SimpleNamespace(client=node)
    holder = Holder(link, 2)
    holder.heard(READY)
    link.client = InProcessNode(1 << 20, epoch=2)
    assert not holder.ready
    assert holder.hold("r", KEYS[:2]) is None


def test_blocks_are_held_all_or_none(node: InProcessNode, holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that went from memory since it was looked up is loaded asynchronously, with the others."""
    holder.heard(READY)
    assert holder.hold("r", KEYS) is None
    assert leases(node) == 0

    def gone(keys: Any, timeout: float) -> Any:
        raise NodeUnavailable("gone")

    monkeypatch.setattr(node, "acquire", gone)
    assert holder.hold("r", KEYS[:2]) is None


def test_an_answer_replaces_the_last_one(node: InProcessNode, holder: Holder) -> None:
    holder.heard(READY)
    for _ in range(3):
        holder.hold("r", KEYS[:4])
        assert leases(node) == 4
    holder.hold("other", KEYS[:1])
    holder.drop("r")
    assert leases(node) == 1
    holder.step()
    assert leases(node) == 0, "what was not taken in its step is let go"


def test_what_a_step_loads_is_held_until_its_results_are_there(node: InProcessNode, holder: Holder) -> None:
    """With asynchronous scheduling the next step is scheduled before, and a request may be over before."""
    holder.heard(READY)
    holder.hold("r", KEYS[:3])
    holder.admit("r")
    holder.step()
    holder.step()
    holder.drop("r")
    holder.heard(Told(arrived=1))
    assert leases(node) == 3
    holder.hold("next", KEYS[:2])
    holder.admit("next")
    holder.step()
    assert leases(node) == 5
    holder.heard(Told(in_step=True))
    assert leases(node) == 2
    holder.heard(Told(in_step=True))
    assert leases(node) == 0


def test_after_a_failure_loads_are_asynchronous_until_the_node_is_found_anew(
    node: InProcessNode, holder: Holder
) -> None:
    holder.heard(READY)
    holder.hold("r", KEYS[:3])
    holder.admit("r")
    holder.step()
    holder.heard(Told(in_step=True, failed=frozenset({"r"})))
    assert leases(node) == 0
    assert not holder.ready
    assert holder.hold("next", KEYS[:3]) is None
    holder.heard(READY)
    assert holder.ready


class Reports:
    """A link that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.loads: list[Any] = []

    def report_step(self, *step: Any) -> None:
        self.steps.append(step)

    def report_load(self, *load: Any) -> None:
        self.loads.append(load)


def results(told: Told | None = None) -> Any:
    return SimpleNamespace(
        finished_recving=None, kv_connector_stats=None, invalid_block_ids=set(), kv_connector_worker_meta=told
    )


def test_a_step_that_waits_for_loads_teaches_how_fast_they_are_and_nothing_of_computing() -> None:
    link: Any = Reports()
    now = iter(range(100))
    timing = Timing(link, 2, lambda: float(next(now)))
    timing.scheduled([(1000, 64)], loading=True)
    timing.scheduled([(0, 64)])
    timing.ended(results())
    assert not link.steps
    both = Told(in_step=True, arrived=1, arrived_bytes=1 << 30, arrived_seconds=0.03)
    timing.ended(results(both.aggregate(Told(arrived=1, arrived_bytes=1 << 30, arrived_seconds=0.05))))
    assert [step[0] for step in link.steps] == [64]
    assert link.loads == [(1 << 30, pytest.approx(0.04))]


def test_loads_are_taken_to_be_slow_until_they_were_measured() -> None:
    link: Any = Reports()
    timing = Timing(link, 1)
    before = timing.load_seconds(1 << 30)
    assert before > (1 << 30) / 12e9
    for _ in range(5):
        timing.ended(results(Told(arrived=1, arrived_bytes=1 << 30, arrived_seconds=0.02)))
    assert timing.load_seconds(1 << 30) == pytest.approx(0.02, rel=0.2)
