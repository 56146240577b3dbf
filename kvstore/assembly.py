"""Builds a store from the configuration: which tiers, in which wrappers."""

from __future__ import annotations

from kvstore.config import Config
from kvstore.namespaces import NamespaceBook
from kvstore.node.arena import Arena
from kvstore.store import Store
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier


async def open_store(config: Config, arena: Arena, namespaces: NamespaceBook) -> Store:
    """Open every configured tier over ``arena``. Raises ConfigError; what was opened is closed again."""
    metrics = StoreMetrics()
    host = HostTier(arena, config.host.extent_bytes)
    lower: list[Tier] = []
    try:
        if config.disk.enabled:
            from kvstore.tiers.disk import DiskTier

            lower.append(
                await DiskTier.open(
                    config.disk_directory,
                    config.disk.bytes,
                    segment_bytes=config.disk.segment_bytes,
                    threads=config.disk.threads,
                )
            )
        return Store(host, lower, metrics, config.queue_bytes)
    except BaseException:
        for tier in reversed([host, *lower]):
            await tier.close()
        raise
