"""The slab allocator against a plain model of its slots."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import BlockTooLarge
from kvstore.slabs import SlabAllocator

EXTENT = 1200
SIZES = [100, 300, 500, 1200]


class SlabMachine(RuleBasedStateMachine):
    """Slots never overlap, stay inside their extent, and room is found whenever there is some."""

    def __init__(self) -> None:
        super().__init__()
        self.slabs = SlabAllocator(3, EXTENT)
        self.extents = {0, 1, 2}
        self.used: dict[int, int] = {}

    def room(self, size: int) -> int:
        """Slots of this size that a model finds: per extent without slots of another size."""
        total = 0
        for number in self.extents:
            inside = [held for offset, held in self.used.items() if offset // EXTENT == number]
            if all(held == size for held in inside):
                total += EXTENT // size - len(inside)
        return total

    @rule(size=st.sampled_from(SIZES))
    def allocate(self, size: int) -> None:
        room = self.room(size)
        assert self.slabs.room(size) == room
        offset = self.slabs.allocate(size)
        assert (offset is None) == (room == 0)
        if offset is not None:
            self.take(offset, size)

    @rule(offset=st.integers(0, 4 * EXTENT // 100).map(lambda n: n * 100), size=st.sampled_from([*SIZES, 700]))
    def claim(self, offset: int, size: int) -> None:
        number, within = divmod(offset, EXTENT)
        fits = number in self.extents and within % size == 0 and within + size <= EXTENT
        inside = [held for other, held in self.used.items() if other // EXTENT == number]
        free = offset not in self.used and all(held == size for held in inside)
        assert self.slabs.claim(offset, size) == (fits and free)
        if fits and free:
            self.take(offset, size)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.used:
            offset = data.draw(st.sampled_from(sorted(self.used)))
            assert self.slabs.slot_bytes(offset) == self.used.pop(offset)
            self.slabs.free(offset)

    @rule()
    def grow(self) -> None:
        if len(self.extents) < 5:
            self.slabs.grow(len(self.extents))
            self.extents.add(len(self.extents))

    def take(self, offset: int, size: int) -> None:
        assert offset // EXTENT in self.extents
        assert offset % EXTENT + size <= EXTENT
        for other, held in self.used.items():
            assert offset + size <= other or other + held <= offset
        self.used[offset] = size

    @invariant()
    def knows_its_extents(self) -> None:
        sizes = {offset // EXTENT: size for offset, size in self.used.items()}
        assert self.slabs.extents() == sizes
        assert self.slabs.free_extents == len(self.extents) - len(sizes)
        assert self.slabs.capacity == len(self.extents) * EXTENT


TestSlabMachine = SlabMachine.TestCase


def test_a_slot_larger_than_an_extent_is_an_error() -> None:
    slabs = SlabAllocator(1, EXTENT)
    for size in (0, EXTENT + 1):
        with pytest.raises(BlockTooLarge):
            slabs.allocate(size)


def test_a_slot_is_freed_once() -> None:
    slabs = SlabAllocator(1, EXTENT)
    offset = slabs.allocate(100)
    assert offset is not None
    slabs.allocate(100)
    slabs.free(offset)
    with pytest.raises(ValueError, match="not in use"):
        slabs.free(offset)


def test_an_extent_is_added_once() -> None:
    slabs = SlabAllocator(1, EXTENT)
    with pytest.raises(ValueError, match="already"):
        slabs.grow(0)
