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
    by_depth = rows[np.argsort(-index.depth[rows].astype(np.int64), kind="stable")]
    starts = np.flatnonzero(np.diff(index.depth[by_depth], prepend=-1))
    for level in np.split(by_depth, starts[1:]):
        children = level[index.parent_row[level] >= 0]
        np.maximum.at(full, index.parent_row[children], full[children])
    return full[rows]


def eviction_order(index: BlockIndex, policy: EvictionPolicy, rows: Rows, now: float) -> Rows:
    """``rows`` in the order in which to give them up: least valuable first, deepest first among equals."""
    values = chain_values(index, rows, policy.values(index, rows, now))
    return rows[np.lexsort((-index.depth[rows].astype(np.int64), values))]
