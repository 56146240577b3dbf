"""Builds a store from the configuration: which tiers, in which wrappers."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from kvstore.config import Config
from kvstore.demand import Demand
from kvstore.encryption import KeyFile, KeyRing, TenantKeys
from kvstore.errors import ConfigError, TierError
from kvstore.history import History
from kvstore.identity import BlockKey, Namespace
from kvstore.kms import kms_at
from kvstore.namespaces import NamespaceBook
from kvstore.node.arena import Arena
from kvstore.policy.admission import AdmissionPolicy, Mode
from kvstore.policy.eviction import LRU, EvictionPolicy
from kvstore.policy.pins import PinnedLast
from kvstore.policy.reuse import Reuse
from kvstore.store import Probe, Store
from kvstore.telemetry import StoreMetrics
from kvstore.tenancy import OneTenant
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.encryption import Encrypting
from kvstore.tiers.host import HostTier
from kvstore.tiers.wrappers import Breaker, Metered, TierMetrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from kvstore.burials import Undertaker
    from kvstore.catalog import Catalog
    from kvstore.catalog.hotness import Reporter
    from kvstore.catalog.sharing import Sharing
    from kvstore.tenants.shared import OfTenant, Shared
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.object import ObjectSettings, ObjectTier, Peers

log = structlog.get_logger(__name__)


async def open_store(
    config: Config, arena: Arena, namespaces: NamespaceBook, demand: Demand, shared: Shared | None = None
) -> Store:
    """Open every configured tier over ``arena``. Raises ConfigError; what was opened is closed again.

    ``shared``, where the node has several tenants, is told of the tiers.
    """
    metrics = StoreMetrics()
    measured = TierMetrics(metrics.registry)
    history = History()
    eviction = ranking_for(config, demand)
    admission = AdmissionPolicy(demand.traffic, demand.pins, Mode(config.policy.admission))
    host = HostTier(arena, config.host.extent, eviction)
    host.on_evict = history.evicted
    lower: list[Tier] = []
    afar: list[Tier] = []
    probe: Probe | None = None
    bucket: ObjectTier | None = None
    undertaker = open_undertaker(config, namespaces)
    try:
        if config.disk.enabled:
            disk = await open_disk(config, eviction if shared is None else shared.fair(Medium.DISK, eviction))
            disk.on_evict = history.evicted
            if shared is not None:
                shared.take_disk(disk)
            lower.append(Metered(disk if undertaker is None else undertaker.over(disk), measured))
        if config.object.url:
            sharing = await open_sharing(config)
            ranking = eviction if shared is None else shared.fair(Medium.OBJECT, eviction)
            bucket = await open_object(config, sharing, ranking)
            bucket.on_evict = history.evicted
            assert undertaker is not None
            if shared is not None:
                shared.take_bucket(bucket, undertaker, bucket.probe if sharing is None else sharing.probe)
            own = OneTenant(bucket, config.identity.tenant, namespaces, bucket.namespace)
            lower.append(Metered(Breaker(undertaker.attend(own)), measured))
            probe = bucket.probe if sharing is None else sharing.probe
            if sharing is not None:
                sharing.watch(metrics.registry)
                _hear_of_purges(sharing, undertaker)
                heed_pins = partial(_heed_pins, sharing)
                heed_pins(demand, config.identity.tenant, lambda keys: [tier.touch(keys) for tier in (host, *lower)])
                if shared is not None:
                    shared.heed_pins = heed_pins
            _share_namespaces(namespaces, bucket)
            demand.publish = _reporter(config, demand, bucket, sharing, shared)
            if sharing is not None:
                _report_when_asked(config, sharing, demand.publish)
            if (remote := await open_remote(config, metrics.registry)) is not None:
                if shared is not None:
                    shared.remote = remote
                others = remote(config.identity.tenant)
                afar.append(Metered(Breaker(undertaker.over(others)), measured))
        if (keys := encryption_keys(config)) is not None:
            own_or_each = (
                Encrypting if shared is None else shared.encrypting(namespaces, partial(encryption_keys, config))
            )
            lower = [own_or_each(tier, keys) for tier in lower]
            afar = [own_or_each(tier, keys) for tier in afar]
        store = Store(
            host,
            lower,
            metrics,
            config.queue_bytes,
            probe=probe,
            admission=admission,
            history=history,
            afar=afar,
            only_observed=config.remote.mode == "observe",
        )
        if bucket is not None and undertaker is not None:
            undertaker.watch(store, bucket.objects)
        return store
    except BaseException:
        demand.publish = None  # to a bucket that is closed now
        for tier in reversed([host, *lower, *afar]):
            await tier.close()
        raise


async def open_remote(config: Config, registry: CollectorRegistry) -> OfTenant | None:
    """What gives a tenant the tier of all that other regions have, if it is to be read. Raises ConfigError."""
    if config.remote.mode == "off":
        return None
    entries = entry_points(group="kvstore.remote")
    if not entries:
        problem = "the package that reads other regions is not installed"
        raise ConfigError("remote.mode", config.remote.mode, problem, "Install it, or set remote.mode = off.")
    opened: OfTenant = await next(iter(entries)).load()(config, registry)
    return opened


def ranking_for(config: Config, demand: Demand) -> EvictionPolicy:
    """Which blocks go first, by what ``demand`` learnt and pinned."""
    ranking: EvictionPolicy = Reuse(demand.traffic) if config.policy.eviction == "reuse" else LRU()
    return PinnedLast(ranking, demand.pins)


def _heed_pins(
    sharing: Sharing, demand: Demand, tenant: str, pinned: Callable[[Sequence[BlockKey]], object]
) -> Callable[[], object]:
    """Have a tenant's pins here shared with its other nodes of the region; what ends that."""
    from kvstore.catalog.pins import RegionPins

    return sharing.also(RegionPins(sharing.documents, demand.pins, tenant, pinned).round)


def _hear_of_purges(sharing: Sharing, undertaker: Undertaker) -> None:
    """At once, instead of at the next regular look."""
    from kvstore.catalog.purges import Bell

    sharing.also(Bell(sharing.documents, undertaker.wake).round)


def _report_when_asked(config: Config, sharing: Sharing, report: Reporter) -> None:
    """At once, instead of at the next regular time."""
    from kvstore.catalog.asking import Answering

    sharing.also(Answering(sharing.documents, node_name(config.node.directory), report).round)


def _reporter(
    config: Config, demand: Demand, bucket: ObjectTier, sharing: Sharing | None, shared: Shared | None
) -> Reporter:
    from kvstore.catalog.hotness import Reporter

    documents = None if sharing is None else sharing.documents
    split = (lambda rows: ()) if shared is None else shared.split
    return Reporter(demand, bucket, node_name(config.node.directory), documents, split)


def _share_namespaces(namespaces: NamespaceBook, bucket: ObjectTier) -> None:
    """Name ours in the bucket, and learn the names of those that others put there. In the background."""
    background: set[asyncio.Task[None]] = set()

    def spawn(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        background.add(task)
        task.add_done_callback(background.discard)

    async def announce(namespace: Namespace) -> None:
        try:
            await bucket.put_namespace(namespace)
        except TierError as error:
            log.warning("namespace not written to the bucket", model=namespace.model, error=str(error))

    async def learn() -> None:
        try:
            for namespace in (await bucket.namespaces()).values():
                namespaces.learn(namespace)
        except TierError as error:
            log.warning("namespaces not read from the bucket", error=str(error))

    namespaces.announce = lambda namespace: spawn(announce(namespace))
    for known in namespaces:
        spawn(announce(known.fields))
    spawn(learn())


def node_name(directory: Path) -> str:
    """What this node is called in its region: the machine's name, and a mark that survives restarts."""
    mark = directory / "node-id"
    try:
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:8])
        text = mark.read_text().strip()
    except OSError:
        text = uuid.uuid4().hex[:8]
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname()}-{text}")[:128]


def encryption_keys(config: Config, tenant: str = "") -> KeyRing | None:
    """What a tenant's blocks are encrypted with, if anything; by default the node's own. Raises ConfigError."""
    settings, tenant = config.encryption, tenant or config.identity.tenant
    unwrap = kms_at(config.object.region).unwrap
    if settings.key_file is not None:
        return KeyFile(settings.key_file, tenant, unwrap)
    if text := settings.keys.get_secret_value():
        return TenantKeys(unwrap(text), tenant)
    return None


async def open_disk(config: Config, policy: EvictionPolicy | None = None) -> DiskTier:
    """The disk tier as configured. Raises ConfigError, TierUnavailable."""
    from kvstore.tiers.disk import DiskTier

    disk = config.disk
    return await DiskTier.open(
        config.disk_directory, disk.bytes, policy, segment_bytes=disk.segment_bytes, threads=disk.threads
    )


async def open_object(config: Config, peers: Peers | None = None, policy: EvictionPolicy | None = None) -> ObjectTier:
    """The object tier as configured. Raises ConfigError; ``peers`` are closed then."""
    from kvstore.tiers.object import ObjectTier

    try:
        return await ObjectTier.open(object_settings(config), policy, peers)
    except BaseException:
        if peers is not None:
            await peers.close()
        raise


def open_undertaker(config: Config, namespaces: NamespaceBook) -> Undertaker | None:
    """What keeps the tiers clear of what was deleted for good, where there is a bucket to tell of it."""
    if not config.object.url:
        return None
    from kvstore.burials import Undertaker

    return Undertaker(namespaces, config.node.directory / "tombstones.json", node_name(config.node.directory))


async def open_catalog(config: Config) -> Catalog | None:
    """The region's catalog, if one is configured. Raises ConfigError; a server that does not answer is no error."""
    from kvstore import catalog

    settings = config.catalog
    if not settings.url:
        return None
    return await catalog.open_catalog(
        settings.url, config.object.url.rstrip("/"), settings.password.get_secret_value(), settings.ca_file
    )


async def rebuild_catalog(config: Config, catalog: Catalog, progress: Callable[[int], None]) -> int:
    """Drop the catalog's index and fill it again from a listing of the bucket; how many blocks there are.

    ``progress`` is told how many were listed. Raises ConfigError, CatalogUnavailable, TierUnavailable.
    """
    from kvstore.catalog.rebuild import rebuild
    from kvstore.tiers.object import Bucket
    from kvstore.tiers.object.objects import Objects

    place = object_settings(config)
    if place.folder is None:
        await asyncio.to_thread(Bucket(place).check)
    objects = await asyncio.to_thread(Objects.connect, place)
    try:
        return await rebuild(catalog, objects, f"rebuild:{os.getpid()}", progress)
    finally:
        await objects.close()


async def open_sharing(config: Config) -> Sharing | None:
    """What joins the object tier to the catalog, if one is configured. Raises ConfigError."""
    catalog = await open_catalog(config)
    if catalog is None:
        return None
    from kvstore.catalog.presence import Presence
    from kvstore.catalog.sharing import Sharing

    api = config.api.url if config.api.listen else ""
    here = Presence.here(node_name(config.node.directory), config.region.name, api)
    return Sharing(catalog, here, config.object.bytes, config.host.extent)


def object_settings(config: Config) -> ObjectSettings:
    """Where the bucket is and how to reach it. Raises ConfigError."""
    from kvstore.tiers.object import ObjectSettings

    settings = config.object
    return ObjectSettings(
        url=settings.url,
        endpoint=settings.endpoint,
        region=settings.region,
        access_key_id=settings.access_key_id,
        secret_access_key=settings.secret_access_key.get_secret_value(),
        session_token=settings.session_token.get_secret_value(),
        path_style=settings.path_style,
        ca_file=settings.ca_file,
        create_bucket=settings.create_bucket,
        capacity_bytes=settings.bytes,
        bytes_in_flight=settings.bytes_in_flight,
    )
