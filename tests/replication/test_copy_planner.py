"""The planner: tables for what it decides, properties for what it never does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tombstones import Tombstone
from replication.manifest import HotBlock, Label
from replication.planner import LeftOut, Limits, affordable, by_value, plan

NA, EU = b"n" * 16, b"e" * 16
LABELS = {NA: Label(NA, "llama", "shop", 64), EU: Label(EU, "qwen", "bank", 64)}
SIZE = 8192
"""Of every block with a payload of 4096 bytes."""


def key(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(16, b"."))


def block(name: str, score: float, parent: str = "", pages: int = 1, namespace: bytes = NA) -> HotBlock:
    above = key(parent) if parent else NO_PARENT
    return HotBlock(key(name), above, namespace, 4096 * pages, 1.0, score)


def names(blocks: list[HotBlock] | tuple[HotBlock, ...]) -> str:
    return " ".join(b.key.rstrip(b".").decode() for b in blocks)


TREES = {
    "hottest chain first": ([block("a", 1), block("b", 3)], "b a"),
    "small before large at the same score": ([block("a", 2, pages=9), block("b", 2)], "b a"),
    "parent before a hotter child": ([block("a", 1), block("a1", 10, "a"), block("b", 4)], "a a1 b"),
    "a cold tail waits": ([block("a", 9), block("a1", 1, "a"), block("b", 4)], "a b a1"),
    "two children by value": ([block("a", 9), block("a1", 1, "a"), block("a2", 2, "a")], "a a2 a1"),
    "a deep treasure pulls its path": (
        [block("a", 0), block("a1", 0, "a"), block("a2", 100, "a1"), block("b", 9)],
        "a a1 a2 b",
    ),
    "nothing": ([], ""),
}


@pytest.mark.parametrize("case", TREES, ids=list(TREES))
def test_order(case: str) -> None:
    blocks, expected = TREES[case]
    assert names(by_value(blocks)) == expected


CHAINS = [block("a", 9), block("a1", 8, "a"), block("a2", 7, "a1"), block("b", 5), block("b1", 4, "b")]

LIMITS = [
    (Limits(), set(), "a a1 a2 b b1", {}),
    (Limits(held_bytes=3 * SIZE), set(), "a a1 a2", {LeftOut.BYTES: 1, LeftOut.PARENT: 1}),
    (Limits(copied_bytes=SIZE), set(), "a", {LeftOut.MONEY: 2, LeftOut.PARENT: 2}),
    (Limits(copied_bytes=0), set(), "", {LeftOut.MONEY: 2, LeftOut.PARENT: 3}),
    (Limits(min_score=6), set(), "a a1 a2", {LeftOut.SCORE: 2}),
    (Limits(), {"a", "a1"}, "a2 b b1", {LeftOut.PRESENT: 2}),
    (
        Limits(held_bytes=3 * SIZE),
        {"a", "a1"},
        "a2",
        {LeftOut.PRESENT: 2, LeftOut.BYTES: 1, LeftOut.PARENT: 1},
    ),
    (Limits(), {"a1"}, "a a2 b b1", {LeftOut.PRESENT: 1}),
]


@pytest.mark.parametrize(("limits", "have", "expected", "left"), LIMITS)
def test_limits(limits: Limits, have: set[str], expected: str, left: dict[LeftOut, int]) -> None:
    result = plan(CHAINS, LABELS, {key(name) for name in have}, limits)
    assert names(tuple(result.blocks)) == expected
    assert {reason: tally.blocks for reason, tally in result.left_out.items()} == left


def test_a_score_in_the_tail_keeps_its_whole_chain() -> None:
    blocks = [block("a", 1), block("a1", 1, "a"), block("a2", 50, "a1")]
    assert names(tuple(plan(blocks, LABELS, set(), Limits(min_score=10)).blocks)) == "a a1 a2"


def test_residency_and_flow_judge_namespaces() -> None:
    blocks = [block("a", 1), block("b", 1, namespace=EU)]
    result = plan(
        blocks,
        LABELS,
        set(),
        Limits(),
        wanted=lambda label: LeftOut.RESIDENCY if label.tenant == "bank" else None,
    )
    assert names(tuple(result.blocks)) == "a"
    assert result.left_out[LeftOut.RESIDENCY].nbytes == SIZE


def test_the_buried_are_not_copied() -> None:
    result = plan(CHAINS, LABELS, set(), Limits(), [Tombstone(time=2.0, prefix=key("a1"))])
    assert names(tuple(result.blocks)) == "a b b1"
    assert result.left_out[LeftOut.TOMBSTONE].blocks == 2


def test_a_deep_block_that_was_left_alone_does_not_invite_its_children() -> None:
    """Its parent is dead: what continues it could never be used."""
    result = plan(CHAINS, LABELS, {key("a1")}, Limits(), [Tombstone(time=2.0, namespace=NA, prefix=key("a"))])
    assert names(tuple(result.blocks)) == "b b1"


def test_money() -> None:
    assert affordable(None, 0.02) is None
    assert affordable(5.0, 0.0) is None
    assert affordable(5.0, 0.02) == 250 * 10**9
    assert affordable(-1.0, 0.02) == 0


@st.composite
def forests(draw: st.DrawFn, most: int = 14) -> list[HotBlock]:
    blocks: list[HotBlock] = []
    for place in range(draw(st.integers(0, most))):
        parent = draw(st.integers(-1, place - 1))
        above = blocks[parent] if parent >= 0 else None
        namespace = above.namespace if above else draw(st.sampled_from([NA, EU]))
        score = draw(st.integers(0, 20))
        length = draw(st.integers(0, 5)) * 4096
        name = key(f"k{place}")
        blocks.append(
            HotBlock(name, above.key if above else NO_PARENT, namespace, length, draw(st.floats(0, 10)), score)
        )
    return blocks


limits = st.builds(
    Limits,
    min_score=st.integers(0, 10).map(float),
    held_bytes=st.none() | st.integers(0, 100_000),
    copied_bytes=st.none() | st.integers(0, 100_000),
)
tombstones = st.lists(
    st.builds(Tombstone, time=st.floats(0, 10), tenant=st.sampled_from(["shop", "bank"]))
    | st.builds(Tombstone, time=st.floats(0, 10), prefix=st.integers(0, 14).map(lambda i: bytes(key(f"k{i}")))),
    max_size=3,
)


@given(forests(), st.sets(st.integers(0, 14)), limits, tombstones, st.booleans())
def test_a_plan_keeps_every_promise(
    blocks: list[HotBlock], present: set[int], limit: Limits, stones: list[Tombstone], bank_stays: bool
) -> None:
    have = {key(f"k{i}") for i in present}
    result = plan(
        blocks, LABELS, have, limit, stones,
        lambda label: LeftOut.RESIDENCY if bank_stays and label.tenant == "bank" else None,
    )  # fmt: skip
    there = have | {NO_PARENT}
    for chosen in result.blocks:
        assert chosen.key not in there, "copied twice, or although it is there"
        assert chosen.parent in there, "its parent is neither there nor earlier"
        there.add(chosen.key)
        assert not (bank_stays and LABELS[chosen.namespace].tenant == "bank")
        for stone in stones:
            if stone.tenant == LABELS[chosen.namespace].tenant:
                assert chosen.created > stone.time
    assert limit.copied_bytes is None or result.nbytes <= limit.copied_bytes
    if limit.held_bytes is not None and result.blocks:
        alive = [b for b in blocks if b.key in have and not (bank_stays and LABELS[b.namespace].tenant == "bank")]
        assert result.nbytes <= limit.held_bytes
        if not stones:
            assert sum(b.nbytes for b in alive) + result.nbytes <= limit.held_bytes
    counted = len(result.blocks) + sum(tally.blocks for tally in result.left_out.values())
    assert counted == len(blocks), "every block is chosen or left out for a reason"


@given(forests(most=6))
def test_no_order_is_better(blocks: list[HotBlock]) -> None:
    """Value delayed, summed over the bytes sent: the area above the curve of score over bytes."""

    def waiting(order: list[HotBlock] | tuple[HotBlock, ...]) -> float:
        sent = total = 0.0
        for one in order:
            sent += one.nbytes
            total += one.score * sent
        return total

    def parents_first(order: tuple[HotBlock, ...]) -> bool:
        seen = {NO_PARENT}
        return all(one.parent in seen and (seen.add(one.key) or True) for one in order)

    ordered = by_value(blocks)
    assert sorted(b.key for b in ordered) == sorted(b.key for b in blocks)
    assert parents_first(tuple(ordered))
    assert waiting(ordered) == min(waiting(order) for order in itertools.permutations(blocks) if parents_first(order))
