"""Which blocks a full disk gives up to make room for a slot of some size. Pure.

Space is cut by size class, so room for one class is made by its own least valuable blocks, or by a whole extent of
another class when everything in that extent is worth less (else a class that came first would hold the disk for ever).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.index import BlockIndex, Rows, slot_sizes
from kvstore.policy.eviction import EvictionPolicy, Values, eviction_order


class _KeepPinned(EvictionPolicy):
    """Nothing is worth more than a pinned block, and so than its ancestors."""

    name = "keep-pinned"

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        return np.where(index.pins[rows] > 0, np.inf, self._policy.values(index, rows, now))


def victims(
    index: BlockIndex, policy: EvictionPolicy, slot_bytes: int, extent_bytes: int, now: float, limit: int
) -> Rows:
    """About ``limit`` rows, in the order in which to give them up; empty when no slot of ``slot_bytes`` can be made.

    No row comes before a descendant of it, in whichever class that is; no pinned row and no ancestor of one is among them.
    """
    order = eviction_order(index, _KeepPinned(policy), index.used(), now)
    pinned = np.flatnonzero(index.pins[order])
    free_to_go = (
        int(pinned[0]) if len(pinned) else len(order)
    )  # ancestors of pinned rows are not as deep, so come later
    own = np.flatnonzero(slot_sizes(index.length[order[:free_to_go]]) == slot_bytes)[:limit]
    extent = _coldest_extent(index, order, free_to_go, slot_bytes, extent_bytes)
    extent_is_colder = len(extent) and (not len(own) or extent[-1] < own[0])
    return _with_descendants(index, order, extent if extent_is_colder else own)


def _coldest_extent(index: BlockIndex, order: Rows, free_to_go: int, slot_bytes: int, extent_bytes: int) -> Rows:
    """Positions in ``order`` of the blocks of another class's extent, the one whose best block goes first."""
    extents = index.location[order] // extent_bytes
    last = np.full(int(extents.max(initial=-1)) + 1, -1)
    last[extents] = np.arange(len(order))  # of equal indices the last assignment stays
    own = np.unique(extents[slot_sizes(index.length[order]) == slot_bytes])
    last[own] = -1
    candidates = np.flatnonzero((last >= 0) & (last < free_to_go))
    if not len(candidates):
        return np.zeros(0, dtype=np.intp)
    return np.flatnonzero(extents == candidates[np.argmin(last[candidates])])


def _with_descendants(index: BlockIndex, order: Rows, positions: Rows) -> Rows:
    """Rows at ``positions`` and all their descendants, in the order of ``order``."""
    chosen: npt.NDArray[np.bool_] = np.zeros(len(index.location), dtype=bool)
    chosen[order[positions]] = True
    parents = index.parent_row[order]
    while True:
        more: Rows = order[(parents >= 0) & chosen[parents] & ~chosen[order]]
        if not len(more):
            rows: Rows = order[chosen[order]]
            return rows
        chosen[more] = True
