"""Who pays when the tier that tenants share is full. Pure.

Whoever is above its quota pays first, with its own blocks. Then whoever holds most pays, block by block, until others hold as
much: so nobody who holds less than an equal part of the tier loses a block to somebody who holds more, and what one tenant
leaves unused others may use (max-min fairness). Within a tenant its own policy says which block goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from kvstore.index import BlockIndex, Rows, slot_sizes
from kvstore.policy.eviction import EvictionPolicy, Values, eviction_order
from kvstore.tenants.ledger import Ledger

Sizes = npt.NDArray[np.int64]

NOBODY = ""


def claims(sizes: Sizes, quota: int | None) -> Values:
    """How much each block is in the way of others: ``sizes`` are a tenant's, in the order in which it gives blocks up.

    That is what the tenant would still hold with this block, and above all else while that exceeds its quota.
    """
    holds = sizes[::-1].cumsum()[::-1].astype(np.float64)
    if quota is None:
        return holds
    return np.where(holds > quota, holds + np.float64(1 << 62), holds)


class FairShare(EvictionPolicy):
    """Ranks the blocks of a shared tier by their claims, and those of a tenant in the order of its own policy."""

    name = "fair"

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        policies: Mapping[str, EvictionPolicy],
        others: EvictionPolicy,
        quotas: Callable[[], Mapping[str, int]],
    ) -> None:
        """``policies`` by tenant; ``others`` is that of all who have none."""
        self.name = others.name
        self._ledger = ledger
        self._policies = policies
        self._others = others
        self._quotas = quotas

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        values = np.zeros(len(rows))
        quotas = self._quotas()
        owned = np.zeros(len(rows), dtype=bool)
        groups = self._ledger().owners(rows)
        for positions in groups.values():
            owned[positions] = True
        if not owned.all():
            groups[NOBODY] = np.flatnonzero(~owned)
        place = np.full(len(index.location), -1, dtype=np.intp)
        place[rows] = np.arange(len(rows))
        for tenant, positions in groups.items():
            policy = self._policies.get(tenant, self._others)
            order = eviction_order(index, policy, rows[positions], now)
            values[place[order]] = -claims(slot_sizes(index.length[order]), quotas.get(tenant))
        return values
