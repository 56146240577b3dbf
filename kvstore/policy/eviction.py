"""Which blocks a full tier gives up first.

A policy values every block; the least valuable go first. A block is never worth less than its descendants, because
without it they are worth nothing: so chains go tail first and no suffix is orphaned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from kvstore.index import BlockIndex, Rows

Values = npt.NDArray[np.float64]


class EvictionPolicy(ABC):
    """Values blocks. Called in the tier's event loop; must not block or change the index."""

    name: str

    @abstractmethod
    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        """What keeping each of ``rows`` is worth, in any unit; compared within one tier only."""


class LRU(EvictionPolicy):
    """The block that was used last is worth most."""

    name = "lru"

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        return index.accessed[rows]


def chain_values(index: BlockIndex, rows: Rows, values: Values) -> Values:
    """Raise each value to the highest among the block's descendants (of those in ``rows``)."""
    if not len(rows):
        return values
    full = np.full(len(index.location), -np.inf)
    full[rows] = values
    parent = index.parent_row
    below = np.flatnonzero(parent >= 0)
    if (full[below] <= full[parent[below]]).all():
        return values
    # After step k a block has the highest value of its descendants up to 2**k levels down.
    ancestor = parent.astype(np.intp)
    while len(below):
        np.maximum.at(full, ancestor[below], full[below])
        ancestor = np.where(ancestor >= 0, ancestor[ancestor], -1)
        below = below[ancestor[below] >= 0]
    return full[rows]


def eviction_order(index: BlockIndex, policy: EvictionPolicy, rows: Rows, now: float) -> Rows:
    """``rows`` in the order in which to give them up: least valuable first, deepest first among equals."""
    values = chain_values(index, rows, policy.values(index, rows, now))
    order: Rows = rows[np.lexsort((-index.depth[rows].astype(np.int64), values))]
    return order
