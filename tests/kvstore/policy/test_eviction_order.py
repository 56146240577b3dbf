"""Ranking of an index: whatever a policy says, no block goes before its descendants."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.envelope import Header
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.eviction import LRU, EvictionPolicy, Values, chain_values, eviction_order


class Given(EvictionPolicy):
    """Values by row, as a test says."""

    name = "given"

    def __init__(self, values: list[float]) -> None:
        self._values = np.array(values)

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        chosen: Values = self._values[rows]
        return chosen


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(KEY_BYTES, "big"))


def forest(parents: list[int]) -> BlockIndex:
    """Row i is block i; ``parents[i] < i``, or -1."""
    index = BlockIndex()
    depths: list[int] = []
    for number, above in enumerate(parents):
        depths.append(depths[above] + 1 if above >= 0 else 0)
        parent = key(above + 1) if above >= 0 else NO_PARENT
        header = Header(
            key=key(number + 1), namespace=bytes(16), parent=parent, index=depths[-1], tokens=64, length=9, crc=0
        )
        assert index.add(header, number, 0.0) == number
    return index


forests = st.integers(1, 40).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))).map(list))


@given(forests, st.data())
def test_no_block_goes_before_its_descendants(parents: list[int], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(parents), max_size=len(parents)))
    order = eviction_order(forest(parents), Given(values), np.arange(len(parents)), 0.0).tolist()
    assert sorted(order) == list(range(len(parents)))
    place = {row: position for position, row in enumerate(order)}
    assert all(place[row] < place[above] for row, above in enumerate(parents) if above >= 0)


@given(forests, st.data())
def test_a_block_is_worth_what_its_best_descendant_is(parents: list[int], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-9, 9), min_size=len(parents), max_size=len(parents)))
    ranked = np.array(sorted(data.draw(st.sets(st.integers(0, len(parents) - 1)))), dtype=np.intp)
    raised = chain_values(forest(parents), ranked, np.array(values)[ranked])
    best = {row: values[row] for row in ranked.tolist()}
    for row in ranked[::-1].tolist():
        above = parents[row]
        while above >= 0:
            if above in best:
                best[above] = max(best[above], values[row])
            above = parents[above]
    assert raised.tolist() == [best[row] for row in ranked.tolist()]


def test_lru_gives_up_the_oldest_first_and_tails_before_heads() -> None:
    index = forest([-1, 0, 1, -1])
    index.accessed[[0, 1, 2]] = 5.0
    index.accessed[3] = 4.0
    assert eviction_order(index, LRU(), index.used(), 9.0).tolist() == [3, 2, 1, 0]
