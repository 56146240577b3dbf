"""How the shares of a window of blocks become copies. Arithmetic on columns of numbers alone.

The shares lie one behind the other, as if in one long buffer. A group is so many bytes of that, wherever a block ends, and
is staged in a buffer of its size, of which there are few: they take turns. Copies are cut where groups meet, and where the
arena's pinned slices meet: CUDA refuses one that spans two registrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.layout import Run

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Copies, in bytes; those of group ``g`` are ``bounds[g]:bounds[g + 1]``."""

    arena: Column
    """Where in the arena."""
    staged: Column
    """Where in the buffers, which lie one behind the other."""
    sizes: Column
    bounds: Sequence[int]


class Cutter:
    """For shares of these ``runs``, ``buffers`` of ``group_bytes`` and slices of ``slice_bytes``.

    What does not depend on where the blocks are is kept: little may lie between a transfer and its first copy.
    """

    def __init__(self, runs: Sequence[Run], group_bytes: int, buffers: int, slice_bytes: int) -> None:
        self._offsets, self._sizes = np.array(runs, np.int64).T
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._share = int(self._sizes.sum())
        self._group, self._buffers, self._slice = group_bytes, buffers, slice_bytes
        self._kept: dict[tuple[int, int], tuple[Column, Pieces]] = {}

    def __call__(self, blocks: Column, buffer: int) -> Pieces:
        """For blocks at these offsets of the arena, the first group of which is staged in this buffer."""
        key = len(blocks), buffer
        if (kept := self._kept.get(key)) is None:
            kept = self._kept[key] = self._within(*key)
        block, first = kept
        arena = blocks[block] + first.arena
        if not (arena % self._slice + first.sizes > self._slice).any():
            return Pieces(arena, first.staged, first.sizes, first.bounds)
        which, skipped, sizes = _cut(arena, first.sizes, self._slice)
        bounds = np.searchsorted(which, first.bounds).tolist()
        return Pieces(arena[which] + skipped, first.staged[which] + skipped, sizes, bounds)

    def _within(self, count: int, buffer: int) -> tuple[Column, Pieces]:
        """Cut where groups meet: the block of each piece, and the pieces, with places in the block for places in the arena."""
        runs = (self._share * np.arange(count)[:, None] + self._starts).ravel()
        which, skipped, sizes = _cut(runs, np.tile(self._sizes, count), self._group)
        linear = runs[which] + skipped
        bounds = np.searchsorted(linear, np.arange(0, count * self._share + self._group, self._group)).tolist()
        staged = (linear + buffer * self._group) % (self._buffers * self._group)
        inside = np.tile(self._offsets, count)[which] + skipped
        return linear // self._share, Pieces(inside, staged, sizes, bounds)


def _cut(at: Column, sizes: Column, period: int) -> tuple[Column, Column, Column]:
    """Pieces cut where they pass a multiple of ``period``: of which one each part is, how much of that is before it, its size."""
    first = at // period
    parts = (at + sizes - 1) // period - first + 1
    which = np.repeat(np.arange(len(at)), parts)
    nth = np.arange(len(which)) - (np.cumsum(parts) - parts)[which]
    begin = (first[which] + nth) * period - at[which]
    skipped = np.maximum(begin, 0)
    return which, skipped, np.minimum(begin + period, sizes[which]) - skipped
