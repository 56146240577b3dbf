"""Builds a store from the configuration: which tiers, in which wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.config import Config
from kvstore.namespaces import NamespaceBook
from kvstore.node.arena import Arena
from kvstore.store import Store
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier

if TYPE_CHECKING:
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.object import ObjectSettings, ObjectTier


async def open_store(config: Config, arena: Arena, namespaces: NamespaceBook) -> Store:
    """Open every configured tier over ``arena``. Raises ConfigError; what was opened is closed again."""
    metrics = StoreMetrics()
    host = HostTier(arena, config.host.extent_bytes)
    lower: list[Tier] = []
    try:
        if config.disk.enabled:
            lower.append(await open_disk(config))
        return Store(host, lower, metrics, config.queue_bytes)
    except BaseException:
        for tier in reversed([host, *lower]):
            await tier.close()
        raise


async def open_disk(config: Config) -> DiskTier:
    """The disk tier as configured. Raises ConfigError, TierUnavailable."""
    from kvstore.tiers.disk import DiskTier

    disk = config.disk
    return await DiskTier.open(
        config.disk_directory, disk.bytes, segment_bytes=disk.segment_bytes, threads=disk.threads
    )


async def open_object(config: Config) -> ObjectTier:
    """The object tier as configured. Raises ConfigError."""
    from kvstore.tiers.object import ObjectTier

    return await ObjectTier.open(object_settings(config))


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
