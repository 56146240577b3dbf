"""What the tenants of a node share: disk and bucket, whose every block is somebody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvstore.encryption import KeyRing
from kvstore.envelope import Header
from kvstore.identity import BlockKey, Namespace
from kvstore.index import Rows
from kvstore.namespaces import NamespaceBook
from kvstore.policy.eviction import EvictionPolicy
from kvstore.store import Probe, Store
from kvstore.tenants.fairness import FairShare
from kvstore.tenants.ledger import Ledger
from kvstore.tiers.base import Medium, OnEvict, Tier
from kvstore.tiers.encryption import Encrypting

if TYPE_CHECKING:
    from kvstore.burials import Undertaker
    from kvstore.demand import Demand
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.object import ObjectTier


HeedPins = Callable[["Demand", str, Callable[[Sequence[BlockKey]], object]], Callable[[], object]]
"""Of a tenant's demand, its name, and what is told of blocks that others want kept; returns what ends it."""


OfTenant = Callable[[str], Tier]
"""Gives a tenant its part of a tier."""


class Shared:
    """Filled by ``kvstore.assembly.open_store``. Owned by the node's event loop."""

    def __init__(self, policies: Mapping[str, EvictionPolicy], quotas: Mapping[Medium, Mapping[str, int]]) -> None:
        """Both by tenant, live; ``quotas`` in bytes, of disk and bucket."""
        self.disk: DiskTier | None = None
        self.bucket: ObjectTier | None = None
        self.undertaker: Undertaker | None = None
        self.probe: Probe | None = None
        self.remote: OfTenant | None = None
        """What other regions have."""
        self.heed_pins: HeedPins = lambda demand, tenant, pinned: lambda: None
        """Shares a tenant's pins with its other nodes of the region, where there is a catalog."""
        self.ledgers: dict[Medium, Ledger] = {}
        self.demands: Callable[[], Mapping[str, Demand]] = dict
        """What each tenant's engines ask for, by tenant, as they are now."""
        self.stores: Callable[[], Mapping[str, Store]] = dict
        """By tenant, as they are now."""
        self._policies = policies
        self._quotas = quotas

    def adopt(self, namespace: Namespace) -> None:
        """The blocks of a namespace are its tenant's, in every tier."""
        for ledger in self.ledgers.values():
            ledger.adopt(namespace)

    def fair(self, medium: Medium, policy: EvictionPolicy) -> EvictionPolicy:
        """The tier's ranking; ``policy`` is that of blocks whose tenant has none of its own."""
        return FairShare(lambda: self.ledgers[medium], self._policies, policy, lambda: self._quotas[medium])

    def take_disk(self, disk: DiskTier) -> None:
        """Just opened."""
        self.disk, self.ledgers[Medium.DISK] = disk, Ledger(disk.index)
        if disk.on_evict is not None:
            disk.on_evict = self.telling(disk.on_evict)

    def take_bucket(self, bucket: ObjectTier, undertaker: Undertaker, probe: Probe) -> None:
        """Just opened."""
        self.bucket, self.ledgers[Medium.OBJECT] = bucket, Ledger(bucket.index)
        self.undertaker, self.probe = undertaker, probe
        undertaker.others = lambda: self.stores().values()
        if bucket.on_evict is not None:
            bucket.on_evict = self.telling(bucket.on_evict)

    def split(self, rows: Rows) -> list[tuple[Demand, Rows]]:
        """Of some rows of the bucket's index those of each tenant that is served, and what its engines ask for."""
        places = self.ledgers[Medium.OBJECT].owners(rows)
        return [(demand, rows[places.get(name, slice(0))]) for name, demand in self.demands().items()]

    def encrypting(
        self, namespaces: NamespaceBook, keys_of: Callable[[str], KeyRing | None]
    ) -> Callable[[Tier, KeyRing], Tier]:
        """What encrypts a tier of all tenants."""
        kept: dict[str, KeyRing | None] = {}

        def ring(tenant: str) -> KeyRing | None:
            if tenant not in kept:
                kept[tenant] = keys_of(tenant)
            return kept[tenant]

        return lambda tier, keys: EncryptingEach(tier, keys, namespaces, ring)

    def telling(self, own: OnEvict) -> OnEvict:
        """Tells each tenant of its blocks that went to make room for others, though not for whom; ``own`` of all else."""

        def tell(medium: Medium, keys: Sequence[BlockKey], newcomer: BlockKey | None) -> None:
            stores, told = self.stores(), set[BlockKey]()
            for tenant, mine in self.ledgers[medium].had(keys).items():
                if (store := stores.get(tenant)) is not None:
                    store.history.evicted(medium, mine, None)
                    told.update(mine)
            if rest := [key for key in keys if key not in told]:
                own(medium, rest, newcomer)

        return tell


class EncryptingEach(Encrypting):
    """Encrypts and decrypts each block with the keys of its tenant: for whoever looks after all of them."""

    def __init__(
        self, inner: Tier, keys: KeyRing, namespaces: NamespaceBook, keys_of: Callable[[str], KeyRing | None]
    ) -> None:
        """``keys`` are for blocks of namespaces that are not known."""
        super().__init__(inner, keys)
        self._namespaces = namespaces
        self._keys_of = keys_of

    def keys_for(self, header: Header) -> KeyRing:
        known = self._namespaces.get(header.namespace)
        return (known and self._keys_of(known.fields.tenant)) or self._keys
