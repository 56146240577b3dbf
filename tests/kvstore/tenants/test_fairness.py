"""Who pays when a shared tier is full."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.envelope import Header
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.index import BlockIndex
from kvstore.policy.eviction import LRU, eviction_order
from kvstore.tenants.fairness import FairShare, claims
from kvstore.tenants.ledger import Ledger

PAGE = 4096


def dues(used: Mapping[str, int], quotas: Mapping[str, int], room: int) -> dict[str, int]:
    """The rule that the ranking is held to: bytes that each tenant gives up so that ``room`` bytes are free. First what is above
    quotas, then from the top.

    More than ``room`` only where quotas are exceeded by more; tenants that give nothing up are left out.
    """
    due = {name: max(nbytes - quotas.get(name, nbytes), 0) for name, nbytes in used.items()}
    left = {name: nbytes - due[name] for name, nbytes in used.items()}
    still = min(room - sum(due.values()), sum(left.values()))
    if still > 0:
        for name, nbytes in left.items():
            due[name] += max(nbytes - _level(list(left.values()), still), 0)
    return {name: nbytes for name, nbytes in due.items() if nbytes}


def _level(holdings: list[int], room: int) -> int:
    """Down to where the largest must shrink for ``room`` bytes, rounded down."""
    highest_first = sorted(holdings, reverse=True)
    taken = 0
    for count, nbytes in enumerate(highest_first, start=1):
        below = highest_first[count] if count < len(highest_first) else 0
        if taken + count * (nbytes - below) >= room:
            return nbytes - -(-(room - taken) // count)
        taken += count * (nbytes - below)
    return 0


@pytest.mark.parametrize(
    ("used", "quotas", "room", "due"),
    [
        ({"a": 10}, {}, 3, {"a": 3}),
        ({"a": 10, "b": 4}, {}, 3, {"a": 3}),
        ({"a": 10, "b": 4}, {}, 8, {"a": 7, "b": 1}),  # down to 3 each
        ({"a": 10, "b": 10}, {}, 4, {"a": 2, "b": 2}),
        ({"a": 10, "b": 8, "c": 1}, {}, 6, {"a": 4, "b": 2}),
        ({"a": 10, "b": 4}, {"b": 2}, 2, {"b": 2}),  # above its quota, however little it holds
        ({"a": 10, "b": 4}, {"b": 2}, 3, {"a": 1, "b": 2}),
        ({"a": 10, "b": 4}, {"b": 1}, 1, {"b": 3}),
        ({"a": 2, "b": 1}, {}, 100, {"a": 2, "b": 1}),
        ({}, {}, 5, {}),
    ],
)
def test_who_is_above_its_quota_pays_first_then_who_holds_most(
    used: dict[str, int], quotas: dict[str, int], room: int, due: dict[str, int]
) -> None:
    assert dues(used, quotas, room) == due


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 1000), min_size=1),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 1000)),
    st.integers(0, 5000),
)
def test_room_is_made_and_nobody_below_an_equal_part_pays_for_somebody_above(
    used: dict[str, int], quotas: dict[str, int], room: int
) -> None:
    due = dues(used, quotas, room)
    left = {name: nbytes - due.get(name, 0) for name, nbytes in used.items()}
    assert all(nbytes >= 0 for nbytes in left.values())
    assert all(left[name] <= quotas[name] for name in used if name in quotas)
    assert sum(due.values()) >= min(room, sum(used.values()))
    paid_for_others = [n for n in due if left[n] < min(used[n], quotas.get(n, used[n]))]
    assert all(left[name] >= max(left.values()) - 1 for name in paid_for_others)


def test_claims_are_what_is_held_and_above_all_what_exceeds_a_quota() -> None:
    sizes = np.array([1, 2, 3], dtype=np.int64)
    assert claims(sizes, None).tolist() == [6, 5, 3]
    over = claims(sizes, 5)
    assert over[0] > 1e18
    assert over[1:].tolist() == [5, 3]


def namespace(tenant: str) -> Namespace:
    return Namespace(
        model="m", weights="1", dtype="f", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=16,
        layout="opaque:test", tenant=tenant,
    )  # fmt: skip


def filled(chains: dict[str, list[int]]) -> tuple[BlockIndex, Ledger]:
    """An index with a chain of so many pages a block for each tenant; used in order, the first tenant longest ago."""
    index = BlockIndex()
    ledger = Ledger(index)
    now = 0.0
    for tenant, sizes in chains.items():
        space = namespace(tenant)
        ledger.adopt(space)
        parent = NO_PARENT
        for depth, pages in enumerate(sizes):
            key = BlockKey(f"{tenant}{depth}".encode().ljust(16, b"."))
            header = Header(
                key=key, namespace=space.digest, parent=parent, index=depth, tokens=16, length=(pages - 1) * PAGE, crc=0
            )
            index.add(header, location=len(index), now=(now := now + 1))
            parent = key
    return index, ledger


def ranked(index: BlockIndex, ledger: Ledger, quotas: dict[str, int] | None = None) -> list[str]:
    policy = FairShare(lambda: ledger, {}, LRU(), lambda: quotas or {})
    return [index.key(row).rstrip(b".").decode() for row in eviction_order(index, policy, index.used(), 100.0).tolist()]


@pytest.mark.parametrize(
    ("chains", "quotas", "order"),
    [
        ({"a": [2, 2, 2]}, {}, ["a2", "a1", "a0"]),  # one tenant: its own policy, tails first
        ({"a": [2], "b": [2, 2, 2]}, {}, ["b2", "b1"]),  # a's block is the oldest, and b holds most
        ({"a": [2, 2], "b": [2, 2, 2]}, {}, ["b2"]),
        ({"a": [3, 3], "b": [2]}, {"b": PAGE}, ["b0", "a1"]),  # b holds least, and more than it may
    ],
)
def test_blocks_go_in_the_order_in_which_tenants_pay(
    chains: dict[str, list[int]], quotas: dict[str, int], order: list[str]
) -> None:
    assert ranked(*filled(chains), quotas)[: len(order)] == order


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(2, 9), min_size=1, max_size=8), min_size=1),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 40).map(lambda pages: pages * PAGE)),
    st.integers(1, 30),
)
def test_the_ranking_takes_what_is_due_and_never_a_block_before_its_continuation(
    chains: dict[str, list[int]], quotas: dict[str, int], pages: int
) -> None:
    index, ledger = filled(chains)
    order = ranked(index, ledger, quotas)
    for tenant in chains:
        depths = [int(name[1:]) for name in order if name[0] == tenant]
        assert depths == sorted(depths, reverse=True)
    due = dues(ledger.used(), quotas, pages * PAGE)
    taken, freed, largest = dict.fromkeys(chains, 0), 0, 9 * PAGE
    for name in order:
        exceeding = any(ledger.used()[t] - taken[t] > quotas.get(t, 1 << 60) for t in chains)
        if freed >= pages * PAGE and not exceeding:
            break
        size = chains[name[0]][int(name[1:])] * PAGE
        taken[name[0]] += size
        freed += size
    for tenant in chains:
        assert abs(taken[tenant] - due.get(tenant, 0)) <= 2 * largest, "to within a block or two"


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "adopt"]), st.sampled_from("abc"), st.integers(0, 9), st.integers(2, 9)
    ),
    max_size=60,
)


@given(operations)
def test_a_ledger_is_always_what_the_index_says(steps: list[tuple[str, str, int, int]]) -> None:
    index = BlockIndex()
    ledger = Ledger(index)
    adopted: set[str] = set()
    for step, tenant, number, pages in steps:
        key = BlockKey(f"{tenant}{number}".encode().ljust(16, b"."))
        if step == "add":
            header = Header(
                key=key, namespace=namespace(tenant).digest, parent=NO_PARENT, index=0, tokens=16,
                length=(pages - 1) * PAGE, crc=0,
            )  # fmt: skip
            index.add(header, location=number, now=1.0)
        elif step == "remove":
            index.remove(key)
        else:
            ledger.adopt(namespace(tenant))
            adopted.add(tenant)
    for tenant in adopted:
        mine = {key for key in index.keys() if key[:1] == tenant.encode()}
        rows = index.rows(sorted(mine))
        assert ledger.keys(tenant) == mine
        assert ledger.used()[tenant] == int(index.length[rows].sum()) + PAGE * len(rows)
        assert {index.key(row) for row in ledger.rows(tenant).tolist()} == mine
