"""Whose the blocks of a tier are: for each tenant the keys and the bytes, kept in step with the tier's index.

The index tells of each block that it lists or unlists, so a count is never behind, and after a restart it is what the index
found. A block belongs to the tenant of its namespace; blocks of namespaces that nobody opened here are nobody's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from kvstore.identity import BlockKey, Namespace
from kvstore.index import BlockIndex, Rows, slot_sizes

REMEMBERED = 4096
"""Blocks that went last, whose owner is told to whoever asks why: some batches of an eviction."""


@dataclass(slots=True)
class Holdings:
    """A tenant's part of the tier."""

    keys: set[BlockKey] = field(default_factory=set)
    nbytes: int = 0
    """With headers."""
    coming: int = 0
    """Bytes of blocks that were let in and are not listed yet."""


class Ledger:
    """Of one tier. Owned by its event loop."""

    def __init__(self, index: BlockIndex) -> None:
        """From now on ``index`` tells this ledger alone."""
        self.index = index
        self._owners: dict[bytes, str] = {}
        """By namespace."""
        self._holdings: dict[str, Holdings] = {}
        self._left: OrderedDict[BlockKey, str] = OrderedDict()
        index.listener = self

    def adopt(self, namespace: Namespace) -> None:
        """The blocks of a namespace are its tenant's. The first time it is a pass over the index."""
        digest = namespace.digest
        if digest in self._owners:
            return
        self._owners[digest] = namespace.tenant
        rows = self.index.in_namespace(digest)
        mine = self.of(namespace.tenant)
        mine.keys.update(self.index.key(row) for row in rows.tolist())
        mine.nbytes += int(slot_sizes(self.index.length[rows]).sum())

    def of(self, tenant: str) -> Holdings:
        """What a tenant has; all that is its own is changed here."""
        return self._holdings.setdefault(tenant, Holdings())

    def keys(self, tenant: str) -> AbstractSet[BlockKey]:
        """Live view; membership is one hash probe."""
        return self.of(tenant).keys

    def used(self) -> dict[str, int]:
        """Bytes by tenant."""
        return {tenant: mine.nbytes for tenant, mine in self._holdings.items()}

    def owners(self, rows: Rows) -> dict[str, Rows]:
        """Positions in ``rows`` of each tenant's blocks; those of nobody are left out."""
        names = [self._owners.get(digest) for digest in self.index.namespaces]
        numbers = self.index.namespace[rows]
        found: dict[str, list[Rows]] = {}
        for number in np.unique(numbers).tolist():
            if (name := names[number]) is not None:
                found.setdefault(name, []).append(np.flatnonzero(numbers == number))
        return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}

    def rows(self, tenant: str) -> Rows:
        """Of all the tenant's blocks."""
        mine = [digest for digest, owner in self._owners.items() if owner == tenant]
        parts = [self.index.in_namespace(digest) for digest in mine]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.intp)

    def had(self, keys: Iterable[BlockKey]) -> dict[str, list[BlockKey]]:
        """Which of the blocks that went lately were whose."""
        found: dict[str, list[BlockKey]] = {}
        for key in keys:
            if (owner := self._left.get(key)) is not None:
                found.setdefault(owner, []).append(key)
        return found

    # --- told by the index

    def listed(self, key: BlockKey, namespace: bytes, nbytes: int) -> None:
        if (owner := self._owners.get(namespace)) is not None:
            mine = self.of(owner)
            mine.keys.add(key)
            mine.nbytes += nbytes

    def unlisted(self, key: BlockKey, namespace: bytes, nbytes: int) -> None:
        if (owner := self._owners.get(namespace)) is not None:
            mine = self.of(owner)
            mine.keys.discard(key)
            mine.nbytes -= nbytes
            self._left[key] = owner
            if len(self._left) > REMEMBERED:
                self._left.popitem(last=False)
