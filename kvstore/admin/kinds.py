"""The jobs of every node: reading all blocks of a tier, and filling the catalog anew."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kvstore.admin.jobs import JobKind, Jobs, Running
from kvstore.admin.models.base import TierName, Wanted
from kvstore.admin.node import WORK_SECONDS, NodeView
from kvstore.config import Config

PAGE = 16
"""Blocks that a scrub reads at a time: the node goes on between."""
BAD_SHOWN = 1000


class ScrubOptions(Wanted):
    """Which tiers to read; all that the node keeps, if none is named."""

    tiers: list[TierName] = Field(default_factory=list, max_length=4, examples=[["disk"]])


class NoOptions(Wanted):
    """There is nothing to choose."""


def register(jobs: Jobs, node: NodeView | None, config: Config) -> None:
    """Offer what is possible here."""
    if node is not None:
        jobs.register(scrub_kind(node))
    if config.catalog.url:
        jobs.register(rebuild_kind(config))


def scrub_kind(node: NodeView) -> JobKind:
    async def run(job: Running, options: ScrubOptions) -> dict[str, Any]:
        status = await node.status()
        named = options.tiers or [tier for tier in TierName if tier is not TierName.REMOTE]
        wanted = [tier for tier in status.tiers if tier.medium in named]
        total = sum(tier.blocks for tier in wanted)
        done: dict[str, dict[str, Any]] = job.checkpoint.get("done", {})
        left: list[str] = job.checkpoint.get("left", [tier.medium.value for tier in wanted])
        cursor: str = job.checkpoint.get("cursor", "")
        while left:
            medium = left[0]
            page = await node.change("verify", WORK_SECONDS, medium=medium, cursor=bytes.fromhex(cursor), limit=PAGE)
            tally = done.setdefault(medium, {"checked": 0, "bytes": 0, "bad": []})
            tally["checked"] += page["checked"]
            tally["bytes"] += page["bytes"]
            bad = [{"key": one["key"].hex(), "reason": one["reason"]} for one in page["bad"]]
            tally["bad"] = (tally["bad"] + bad)[:BAD_SHOWN]
            cursor = page["cursor"].hex()
            left = left if cursor else left[1:]
            read = sum(tier["checked"] for tier in done.values())
            job.report(read, max(total, read), "blocks", medium, {"done": done, "left": left, "cursor": cursor})
        return {"tiers": done}

    return JobKind("scrub", "Read and verify every block; bad ones are dropped and quarantined.", ScrubOptions, run)


def rebuild_kind(config: Config) -> JobKind:
    async def run(job: Running, options: NoOptions) -> dict[str, Any]:
        from kvstore.assembly import open_catalog, rebuild_catalog

        catalog = await open_catalog(config)
        assert catalog is not None
        try:
            return {"blocks": await rebuild_catalog(config, catalog, lambda blocks: job.report(blocks, unit="blocks"))}
        finally:
            await catalog.close()

    return JobKind("catalog-rebuild", "Drop the catalog's index and fill it again from the bucket.", NoOptions, run)
