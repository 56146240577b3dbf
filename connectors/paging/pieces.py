"""How the shares of a window of blocks become copies. Arithmetic on columns of numbers alone.

The shares lie one behind the other, as if in one long buffer. A group is so many bytes of that, wherever a block ends, and
is staged in a buffer of its size. Copies are cut where groups meet, and where the arena's pinned slices meet: CUDA refuses
one that spans two registrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """Where in the buffer of its group."""
    sizes: Column
    groups: Column
    """Which group."""
    bounds: Sequence[int]


class Cutter:
    """For shares of these ``runs``, groups of ``group_bytes`` and slices of ``slice_bytes``.

    What depends on the number of blocks alone is kept: little may lie between a transfer and its first copy.
    """

    def __init__(self, runs: Sequence[Run], group_bytes: int, slice_bytes: int) -> None:
        self._offsets, self._sizes = np.array(runs, np.int64).T
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._share = int(self._sizes.sum())
        self._group, self._slice = group_bytes, slice_bytes
        self._kept: dict[int, tuple[Column, Pieces]] = {}

    def __call__(self, blocks: Column) -> Pieces:
        """For blocks at these offsets of the arena."""
        count = len(blocks)
        if (kept := self._kept.get(count)) is None:
            kept = self._kept[count] = self._within(count)
        block, first = kept
        arena = blocks[block] + first.arena
        if not (arena % self._slice + first.sizes > self._slice).any():
            return replace(first, arena=arena)
        linear = first.groups * self._group + first.staged
        return self._ordered(count, *_cut(arena, self._slice, first.sizes, linear))

    def _within(self, count: int) -> tuple[Column, Pieces]:
        """Cut where groups meet: the block of each piece, and the pieces, with places in the block for places in the arena."""
        linear = (self._share * np.arange(count)[:, None] + self._starts).ravel()
        linear, sizes, inside = _cut(linear, self._group, np.tile(self._sizes, count), np.tile(self._offsets, count))
        pieces = self._ordered(count, inside, sizes, linear)
        return (pieces.groups * self._group + pieces.staged) // self._share, pieces

    def _ordered(self, count: int, arena: Column, sizes: Column, linear: Column) -> Pieces:
        order = np.argsort(linear)
        groups, staged = np.divmod(linear[order], self._group)
        bounds = np.searchsorted(groups, np.arange(-(-count * self._share // self._group) + 1))
        return Pieces(arena[order], staged, sizes[order], groups, bounds.tolist())


def _cut(at: Column, period: int, sizes: Column, others: Column) -> tuple[Column, Column, Column]:
    """Cut pieces where ``at`` passes a multiple of ``period``."""
    room = period - at % period
    over = sizes > room
    if not over.any():
        return at, sizes, others
    rest = _cut((at + room)[over], period, (sizes - room)[over], (others + room)[over])
    first = (at, np.minimum(sizes, room), others)
    head, length, other = (np.concatenate(pair) for pair in zip(first, rest, strict=True))
    return head, length, other
