"""The block index against brute force over a dict."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.envelope import Header
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.eviction import LRU, eviction_order

COUNT = 12
numbers = st.integers(1, COUNT)
parents = st.integers(0, COUNT)


def key(number: int) -> BlockKey:
    """Number 0 is no block: the parent of a chain's first."""
    return BlockKey(number.to_bytes(16)) if number else NO_PARENT


def header(number: int, parent: int, depth: int = 0) -> Header:
    namespace = bytes([number % 3]) * 16
    return Header(
        key=key(number),
        namespace=namespace,
        parent=key(parent),
        index=depth,
        tokens=64,
        length=number * 10,
        crc=0,
    )


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.blocks: dict[int, Header] = {}
        self.hits: dict[int, int] = {}
        self.accessed: dict[int, float] = {}
        self.now = 0.0

    @rule(number=numbers, parent=parents)
    def add(self, number: int, parent: int) -> None:
        self.now += 1
        row = self.index.add(header(number, parent), location=number * 4096, now=self.now)
        assert self.index.row(key(number)) == row
        self.blocks[number], self.hits[number], self.accessed[number] = header(number, parent), 0, self.now

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        expected = number * 4096 if self.blocks.pop(number, None) else None
        assert self.index.remove(key(number)) == expected

    @rule(chosen=st.sets(numbers))
    def touch(self, chosen: set[int]) -> None:
        self.now += 1
        self.index.touch([key(number) for number in chosen], self.now)
        for number in chosen & self.blocks.keys():
            self.hits[number] += 1
            self.accessed[number] = self.now

    @rule()
    def load_a_copy(self) -> None:
        """What one index tells is enough to make another."""
        old, new = self.index, BlockIndex()
        rows = old.used()
        keys, parent_keys = old.identities(rows)
        columns = ("location", "accessed", "length", "depth", "hits", "tokens")
        values = {name: getattr(old, name)[rows] for name in columns}
        new.load(keys, parent_keys, old.namespaces, old.namespace[rows], **values)
        self.index = new

    @invariant()
    def tells_what_was_added(self) -> None:
        index = self.index
        assert len(index) == len(self.blocks)
        assert index.keys() == {key(number) for number in self.blocks}
        assert sorted(index.key(row) for row in index.used().tolist()) == sorted(index.keys())
        for number, added in self.blocks.items():
            row = index.row(added.key)
            assert row is not None
            stat = index.stat(row)
            assert (stat.key, stat.parent, stat.namespace) == (added.key, added.parent, added.namespace)
            assert (stat.length, stat.tokens, stat.index) == (added.length, added.tokens, added.index)
            assert (stat.hits, stat.accessed) == (self.hits[number], self.accessed[number])
            assert index.location[row] == number * 4096

    @invariant()
    def links_parents_and_children(self) -> None:
        index = self.index
        for added in self.blocks.values():
            row = index.row(added.key)
            parent = index.row(added.parent)
            assert index.parent_row[row] == (-1 if parent is None else parent)
            assert index.children[row] == sum(other.parent == added.key for other in self.blocks.values())


TestIndexMachine = IndexMachine.TestCase


def test_rows_come_in_the_order_of_the_keys() -> None:
    index = BlockIndex()
    rows = {number: index.add(header(number, 0), number, 0.0) for number in (3, 1, 2)}
    assert index.rows([key(2), key(9), key(3)]).tolist() == [rows[2], rows[3]]


@given(st.lists(st.tuples(parents, st.integers(0, 5)), min_size=1, max_size=COUNT))
def test_eviction_never_takes_a_block_before_its_descendants(forest: list[tuple[int, int]]) -> None:
    """``forest[i]`` is the parent (an earlier block, or none) and the time of use of block i + 1."""
    index = BlockIndex()
    depths = {0: -1}
    for number, (parent, used) in enumerate(forest, 1):
        parent = parent if parent < number else 0
        depths[number] = depths[parent] + 1
        index.add(header(number, parent, depths[number]), number, float(used))
    order = eviction_order(index, LRU(), index.used(), now=10.0)
    position = {int(row): place for place, row in enumerate(order)}
    assert len(position) == len(forest)
    for row, parent in enumerate(index.parent_row[: len(forest)].tolist()):
        assert parent < 0 or position[row] < position[parent]


@given(st.lists(st.integers(0, 100), min_size=1, unique=True))
def test_without_chains_the_least_recently_used_goes_first(times: list[int]) -> None:
    index = BlockIndex()
    for number, used in enumerate(times, 1):
        index.add(header(number, 0), number, float(used))
    order = eviction_order(index, LRU(), index.used(), now=1000.0)
    assert np.all(np.diff(index.accessed[order]) > 0)
