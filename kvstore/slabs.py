"""Carves one address space into fixed slots of several size classes.

The space is cut into extents; an extent belongs to one size class at a time and is cut into that class's slots. A class
takes a free extent when it runs out; an extent whose slots are all free goes back to the pool. The arena and the disk
segments are both carved this way, so a node can hold blocks of several models without fragmenting.

Pure bookkeeping: no I/O, no clock, not thread-safe (the owner's event loop is the only caller).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import BlockTooLarge


@dataclass(slots=True)
class _Extent:
    slot_bytes: int
    free: dict[int, None]
    """Offsets of the free slots, as an ordered set: the one freed last is handed out first."""
    used: int = 0


class SlabAllocator:
    """Offsets of slots in ``extents * extent_bytes`` bytes."""

    def __init__(self, extents: int, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self.capacity = extents * extent_bytes
        self._free_extents = dict.fromkeys(range(extents - 1, -1, -1))
        self._extents: dict[int, _Extent] = {}
        self._partial: dict[int, dict[int, None]] = {}
        """Per size class, the extents that have a free slot (a dict as an ordered set)."""

    def grow(self, number: int) -> None:
        """Add extent ``number``, which was not part of the space so far, to the pool."""
        if number in self._free_extents or number in self._extents:
            raise ValueError(f"extent {number} is already part of the space")
        self._free_extents[number] = None
        self.capacity += self.extent_bytes

    def allocate(self, slot_bytes: int) -> int | None:
        """Offset of a free slot, or None when neither the class nor the pool has room. Raises BlockTooLarge."""
        if not 0 < slot_bytes <= self.extent_bytes:
            raise BlockTooLarge(f"a slot of {slot_bytes} bytes does not fit in an extent of {self.extent_bytes}")
        partial = self._partial.setdefault(slot_bytes, {})
        if not partial:
            if not self._free_extents:
                return None
            self._open(self._free_extents.popitem()[0], slot_bytes)
        number = next(iter(partial))
        extent = self._extents[number]
        offset = extent.free.popitem()[0]
        extent.used += 1
        if not extent.free:
            del partial[number]
        return offset

    def room(self, slot_bytes: int) -> int:
        """How many slots ``allocate`` would find."""
        partial = sum(len(self._extents[number].free) for number in self._partial.get(slot_bytes, ()))
        return partial + len(self._free_extents) * (self.extent_bytes // slot_bytes)

    def claim(self, offset: int, slot_bytes: int) -> bool:
        """Mark the slot at ``offset`` as used, as found by a recovery. False if it cannot be such a slot or is taken."""
        number, within = divmod(offset, self.extent_bytes)
        if slot_bytes <= 0 or within % slot_bytes or within + slot_bytes > self.extent_bytes:
            return False
        extent = self._extents.get(number)
        if extent is None:
            if number not in self._free_extents:
                return False
            del self._free_extents[number]
            extent = self._open(number, slot_bytes)
        if extent.slot_bytes != slot_bytes or offset not in extent.free:
            return False
        del extent.free[offset]
        extent.used += 1
        if not extent.free:
            del self._partial[slot_bytes][number]
        return True

    def free(self, offset: int) -> None:
        """Give a slot back; an extent without used slots returns to the pool."""
        number = offset // self.extent_bytes
        extent = self._extents[number]
        if offset in extent.free:
            raise ValueError(f"the slot at {offset} is not in use")
        extent.free[offset] = None
        extent.used -= 1
        partial = self._partial[extent.slot_bytes]
        if extent.used:
            partial[number] = None
        else:
            partial.pop(number, None)
            del self._extents[number]
            self._free_extents[number] = None

    def slot_bytes(self, offset: int) -> int:
        """Size class of the used slot at ``offset``."""
        return self._extents[offset // self.extent_bytes].slot_bytes

    def used_slots(self, extent: int) -> int:
        """How many slots of an extent in use are taken."""
        return self._extents[extent].used

    def extents(self) -> dict[int, int]:
        """Size class of each extent in use, by extent number."""
        return {number: extent.slot_bytes for number, extent in self._extents.items()}

    @property
    def free_extents(self) -> int:
        return len(self._free_extents)

    def _open(self, number: int, slot_bytes: int) -> _Extent:
        base = number * self.extent_bytes
        slots = range(base, base + self.extent_bytes - slot_bytes + 1, slot_bytes)
        extent = _Extent(slot_bytes, dict.fromkeys(reversed(slots)))
        self._extents[number] = extent
        self._partial.setdefault(slot_bytes, {})[number] = None
        return extent
