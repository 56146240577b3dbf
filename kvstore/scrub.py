"""Reads every block of a tier's storage while no node runs, through the tier's own checks."""

from __future__ import annotations

import asyncio
import mmap
from typing import Any

from kvstore.assembly import open_disk, open_object
from kvstore.config import Config
from kvstore.envelope import envelope_bytes
from kvstore.errors import BlockCorrupt, BlockNotFound, ConfigError, TierUnavailable
from kvstore.tiers.base import Tier


def scrub_offline(config: Config, medium: str | None) -> dict[str, dict[str, Any]]:
    """Check the disk tier and the object tier, or the one named.

    Returns ``{medium: {"checked": blocks, "bytes": bytes, "bad": [{"key", "reason"}]}}``; bad blocks are dropped and
    quarantined. Raises ConfigError when there is nothing to check, TierUnavailable when the storage does not answer.
    """
    return asyncio.run(_scrub_all(config, medium))


async def _scrub_all(config: Config, medium: str | None) -> dict[str, dict[str, Any]]:
    results = {}
    if medium in (None, "disk") and config.disk.enabled and config.disk_directory.is_dir():
        results["disk"] = await _scrub(await open_disk(config))
    if medium in (None, "object") and config.object.url:
        tier = await open_object(config)
        if tier.features is None:
            await tier.close()
            raise TierUnavailable(f"{config.object.url} does not answer")
        await tier.ready.wait()
        results["object"] = await _scrub(tier)
    if not results:
        raise ConfigError("--tier", medium or "", "no storage of that kind is configured here", "See kvstore config.")
    return results


async def _scrub(tier: Tier) -> dict[str, Any]:
    checked = nbytes = 0
    bad = []
    try:
        for key in sorted(tier.keys()):
            if (stat := tier.stat(key)) is None:
                continue
            pages = memoryview(mmap.mmap(-1, envelope_bytes(stat.length)))
            try:
                header = await tier.get(key, pages)
                nbytes += header.envelope_bytes
            except BlockCorrupt as error:
                bad.append({"key": key, "reason": str(error)})
            except BlockNotFound:
                continue
            checked += 1
    finally:
        await tier.close()
    return {"checked": checked, "bytes": nbytes, "bad": bad}
