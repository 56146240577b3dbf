"""How the shares of a window of blocks become copies. Arithmetic on columns of numbers alone.

The shares lie one behind the other, as if in one long buffer. A group is so many bytes of that, wherever a block ends, and
is staged in a buffer of its size. Copies are cut where groups meet, and where the arena's pinned slices meet: CUDA refuses
one that spans two registrations.
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
    """Where in the buffer of its group."""
    sizes: Column
    groups: Column
    """Which group."""
    bounds: Sequence[int]


class Cutter:
    """For shares of these ``runs``, groups of ``group_bytes`` and slices of ``slice_bytes``."""

    def __init__(self, runs: Sequence[Run], group_bytes: int, slice_bytes: int) -> None:
        self._offsets, self._sizes = np.array(runs, np.int64).T
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._share = int(self._sizes.sum())
        self._group, self._slice = group_bytes, slice_bytes

    def __call__(self, blocks: Column) -> Pieces:
        """For blocks at these offsets of the arena."""
        arena = (blocks[:, None] + self._offsets).ravel()
        linear = (self._share * np.arange(len(blocks))[:, None] + self._starts).ravel()
        sizes = np.tile(self._sizes, len(blocks))
        linear, sizes, arena = _cut(linear, self._group, sizes, arena)
        arena, sizes, linear = _cut(arena, self._slice, sizes, linear)
        order = np.argsort(linear)
        linear, sizes, arena = linear[order], sizes[order], arena[order]
        groups, staged = np.divmod(linear, self._group)
        count = -(-len(blocks) * self._share // self._group)
        return Pieces(arena, staged, sizes, groups, np.searchsorted(groups, np.arange(count + 1)).tolist())


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
