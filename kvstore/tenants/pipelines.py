"""A pipeline for each tenant: an arena, a store and verbs of its own, over the disk and the bucket that all of them share.

``Tenants`` follows the book: a new tenant gets a pipeline, one that is changed gets another in its place, and whoever is
connected in a way that the book does not have any more is cut off. An engine that is cut off connects again by itself, and what
it asks for meanwhile is a miss.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial

import structlog

from kvstore.assembly import encryption_keys, ranking_for
from kvstore.config import Config
from kvstore.config.schema import HostSection
from kvstore.demand import Demand
from kvstore.errors import ConfigError, KVStoreError, ProtocolError, TierError
from kvstore.history import History
from kvstore.identity import BlockKey
from kvstore.namespaces import NamespaceBook
from kvstore.node.arena import Arena
from kvstore.node.peers import peer
from kvstore.node.verbs import Verbs
from kvstore.planning import Planning
from kvstore.policy.admission import AdmissionPolicy, Mode
from kvstore.policy.eviction import EvictionPolicy
from kvstore.store import Store
from kvstore.telemetry import StoreMetrics
from kvstore.tenants.book import Operator, Tenant, TenantBook
from kvstore.tenants.metrics import WholeNode
from kvstore.tenants.namespaces import OwnNamespaces
from kvstore.tenants.own import Own
from kvstore.tenants.shared import Shared
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.encryption import Encrypting
from kvstore.tiers.host import HostTier
from kvstore.tiers.wrappers import Breaker, Metered, TierMetrics

log = structlog.get_logger(__name__)

FOLLOW_SECONDS = 1.0
"""How often the book is looked at: one stat of a file."""

MAX_TOKEN_CHARS = 256


@dataclass(frozen=True, eq=False)
class Place:
    """What a connection works with."""

    verbs: Verbs
    store: Store
    arena: Arena


@dataclass(frozen=True, eq=False)
class Pipeline(Place):
    """A tenant's."""

    tenant: Tenant
    """As it was when this was opened."""
    demand: Demand
    own: Mapping[Medium, Own]
    """Its parts of the shared tiers."""
    unheed: Callable[[], object]
    """Ends the sharing of its pins."""

    def fits(self, tenant: Tenant, host_bytes: int) -> bool:
        """Whether it serves the tenant as it is now."""
        return self.tenant.secret == tenant.secret and self.arena.nbytes == host_bytes

    async def close(self, drain_seconds: float) -> None:
        """Write down what waits, as far as the time allows; the shared tiers stay open."""
        self.verbs.draining = True
        self.unheed()
        if not await self.store.drain(drain_seconds):
            log.warning("stopped with writes pending", tenant=self.tenant.name)
        await self.demand.close()
        await self.store.close()


@dataclass(frozen=True, slots=True)
class Shown:
    """What a client showed when it connected."""

    uid: int
    token: str = field(repr=False)

    @classmethod
    def of(cls, client: socket.socket, hello: Mapping[str, object]) -> Shown:
        """What the kernel and its greeting say of a client. Raises ProtocolError."""
        token = hello.get("token", "")
        if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS:
            raise ProtocolError("token must be a text")
        return cls(peer(client)[1], token)


class Tenants:
    """The tenants of a running node. Owned by its event loop."""

    def __init__(self, config: Config, namespaces: NamespaceBook) -> None:
        """Raises ConfigError when the book cannot be used."""
        assert config.tenants.book is not None
        self.book = TenantBook(config.tenants.book)
        self.book.ensure()
        self.changed: Callable[[], None] | None = None
        """Called when clients may have lost what they were connected to."""
        self.pipelines: dict[str, Pipeline] = {}
        self._config = config
        self._namespaces = namespaces
        self._policies: dict[str, EvictionPolicy] = {}
        self._quotas: dict[Medium, dict[str, int]] = {Medium.DISK: {}, Medium.OBJECT: {}}
        self._problems: dict[str, str] = {}
        """What keeps tenants from being served, as it was logged."""
        self._turn = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        for tenant in self.book.tenants():
            self._set_quota(tenant)
        self.shared = Shared(self._policies, self._quotas)
        """Filled by whoever opens the node's tiers."""
        self.shared.stores = self.stores
        self.shared.demands = self._demands

    # --- life

    async def start(self, store: Store) -> None:
        """Open every tenant's pipeline beside the node's own ``store``. Raises ConfigError when the book cannot be read."""
        for known in self._namespaces:
            self.shared.adopt(known.fields)
        self.metrics = WholeNode(store.metrics.registry, self.stores)
        await self.follow()
        self._following = asyncio.create_task(self._follow_regularly())

    async def close(self) -> None:
        """Before the shared tiers are."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        seconds = self._config.node.drain_seconds
        await asyncio.gather(*(pipeline.close(seconds) for pipeline in self.pipelines.values()))
        asked = self._demands()
        self.shared.demands = lambda: asked  # the node's last report is still to come
        self.pipelines.clear()

    def stores(self) -> dict[str, Store]:
        """By tenant."""
        return {name: pipeline.store for name, pipeline in self.pipelines.items()}

    def _demands(self) -> dict[str, Demand]:
        return {name: pipeline.demand for name, pipeline in self.pipelines.items()}

    def of_namespace(self, digest: bytes) -> Pipeline | None:
        """Whose a namespace is; None for the node's own, and for one that is not known."""
        known = self._namespaces.get(digest)
        return None if known is None else self.pipelines.get(known.fields.tenant)

    # --- who is who

    def place(self, shown: Shown) -> Pipeline | None:
        """Where a client belongs now; None for an operator. Raises ProtocolError."""
        try:
            who = self.book.whose(shown.uid, shown.token)
            if who is Operator.OPERATOR:
                return None
            pipeline = None if who is None else self.pipelines.get(self.book.owner(who).name)
        except ConfigError as error:
            log.error("nobody is let in", error=str(error))
            raise ProtocolError("the node's tenant book cannot be used") from error
        if pipeline is None:
            known = "its token" if shown.token else f"user {shown.uid}"
            remedy = "" if shown.token else ", and it showed no token (KVSTORE_NODE__TOKEN_FILE)"
            raise ProtocolError(f"{known} is of no tenant of this node{remedy}")
        return pipeline

    def serving(self, name: str) -> Pipeline:
        """The pipeline that serves a tenant. Raises ProtocolError: never does one see more for want of its own."""
        tenant = self.book.get(name)
        pipeline = None if tenant is None else self.pipelines.get(self.book.owner(tenant).name)
        if pipeline is None:
            raise ProtocolError(f"this node serves no tenant {name!r}")
        return pipeline

    # --- purging

    async def purge(self, name: str) -> dict[str, dict[str, int]]:
        """Delete all that a tenant has in memory and on disk here, also one that is in the book no more.

        How many blocks went and how many are left, by medium. What its engines save meanwhile is left.
        """
        deleted: dict[str, int] = {}
        held = self._held(name)
        pipeline = self.pipelines.get(name)
        if pipeline is not None:
            keys = list({key for part in held.values() for key in part})
            gone = await pipeline.store.delete(keys, tuple(held))
            deleted = {medium.value: count for medium, count in gone.items()}
        elif self.shared.disk is not None:
            deleted = {Medium.DISK.value: await self.shared.disk.delete(list(held.get(Medium.DISK, ())))}
        return {"deleted": deleted, "left": {medium.value: len(keys) for medium, keys in self._held(name).items()}}

    def _held(self, name: str) -> dict[Medium, AbstractSet[BlockKey]]:
        """A tenant's blocks in the tiers of this node alone."""
        held: dict[Medium, AbstractSet[BlockKey]] = {}
        if (pipeline := self.pipelines.get(name)) is not None:
            held[Medium.HOST] = pipeline.store.host.keys()
        if (ledger := self.shared.ledgers.get(Medium.DISK)) is not None:
            held[Medium.DISK] = ledger.keys(name)
        return held

    # --- following the book

    async def follow(self) -> None:
        """Be as the book is now. A tenant that cannot be served is logged, and tried again. Raises ConfigError for the book."""
        async with self._turn:
            wanted = {tenant.name: tenant for tenant in self.book.tenants() if not tenant.shares}
            ending = [
                name
                for name, pipeline in self.pipelines.items()
                if name not in wanted or not pipeline.fits(wanted[name], self._host_bytes(wanted[name]))
            ]
            gone = [self.pipelines.pop(name) for name in ending]
            if self.changed is not None:
                self.changed()
            await asyncio.gather(*(pipeline.close(self._config.node.drain_seconds) for pipeline in gone))
            for tenant in wanted.values():
                self._set_quota(tenant)
                try:
                    if tenant.name not in self.pipelines:
                        self.pipelines[tenant.name] = self._open(tenant)
                    for own in self.pipelines[tenant.name].own.values():
                        await own.keep_quota()
                    self._problems.pop(tenant.name, None)
                except (ConfigError, TierError, OSError) as error:
                    if self._problems.get(tenant.name) != str(error):  # else it was said before
                        log.error("tenant not served as its book says", tenant=tenant.name, error=str(error))
                    self._problems[tenant.name] = str(error)

    async def _follow_regularly(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.follow()
            except KVStoreError as error:
                log.error("tenant book not followed", error=str(error))

    def _set_quota(self, tenant: Tenant) -> None:
        for medium, quota in ((Medium.DISK, tenant.quota.disk), (Medium.OBJECT, tenant.quota.object)):
            if quota is None:
                self._quotas[medium].pop(tenant.name, None)
            else:
                self._quotas[medium][tenant.name] = quota

    def _host_bytes(self, tenant: Tenant) -> int:
        return tenant.quota.host or self._config.tenants.host_bytes

    # --- a pipeline

    def _open(self, tenant: Tenant) -> Pipeline:
        """Raises ConfigError when there is no memory for its arena."""
        config, shared, name = self._config, self.shared, tenant.name
        folder = config.node.directory / "tenants" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        nbytes = self._host_bytes(tenant)
        extent = HostSection.extent_of(nbytes, config.host.extent_bytes)
        if extent > nbytes:
            problem = f"less than one extent of {extent} bytes"
            raise ConfigError("quota.host", nbytes, problem, "Raise the quota, or lower host.extent_bytes.")
        keys = encryption_keys(config, name)
        arena = Arena.create(nbytes, secrets.randbits(63) or 1)
        demand = Demand(folder / "hotness.msgpack")
        metrics, history = StoreMetrics(), History()
        measured = TierMetrics(metrics.registry)
        policy = self._policies[name] = ranking_for(config, demand)
        host = HostTier(arena, extent, policy)
        host.on_evict = history.evicted
        namespaces = OwnNamespaces(self._namespaces, name, shared.adopt)
        own: dict[Medium, Own] = {}
        lower: list[Tier] = []
        if shared.disk is not None:
            ledger = shared.ledgers[Medium.DISK]
            own[Medium.DISK] = Own(shared.disk, ledger, name, policy, partial(self._quotas[Medium.DISK].get, name))
            lower.append(Metered(self._unburied(own[Medium.DISK]), measured))
        if shared.bucket is not None:
            ledger = shared.ledgers[Medium.OBJECT]
            own[Medium.OBJECT] = Own(
                shared.bucket, ledger, name, policy, partial(self._quotas[Medium.OBJECT].get, name)
            )
            lower.append(Metered(Breaker(self._unburied(own[Medium.OBJECT])), measured))
        afar: list[Tier] = []
        if shared.remote is not None:
            afar.append(Metered(Breaker(self._unburied(shared.remote(name))), measured))
        for part in own.values():
            part.on_evict = history.evicted
        if keys is not None:
            lower = [Encrypting(tier, keys) for tier in lower]
            afar = [Encrypting(tier, keys) for tier in afar]
        admission = AdmissionPolicy(demand.traffic, demand.pins, Mode(config.policy.admission))
        store = Store(
            host,
            lower,
            metrics,
            arena.nbytes // 4,
            probe=shared.probe,
            admission=admission,
            history=history,
            afar=afar,
            only_observed=config.remote.mode == "observe",
        )
        planning = Planning.of(config.policy, store, demand)
        verbs = Verbs(store, namespaces, demand, planning, name, tenant.secret_bytes(), arena.epoch)
        unheed = shared.heed_pins(demand, name, lambda keys: [tier.touch(keys) for tier in store.tiers])
        return Pipeline(verbs, store, arena, tenant, demand, own, unheed)

    def _unburied(self, tier: Tier) -> Tier:
        undertaker = self.shared.undertaker
        return tier if undertaker is None else undertaker.over(tier)
