"""The node and its tiers, as they are now."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter

from kvstore.admin.auth import reads
from kvstore.admin.models.base import TierName
from kvstore.admin.models.status import ClientStatus, NodeStatus, TierStatus, WarmthStatus
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentNode, CurrentSite
from kvstore.warmth import read_warmth

router = APIRouter(dependencies=reads(), responses=documented(503, 504))


@router.get("/v1/status", tags=["status"])
async def status(node: CurrentNode) -> NodeStatus:
    """The node: tiers, clients, namespaces, counters. At most a quarter of a second old."""
    return await node.status()


@router.get("/v1/tiers", tags=["status"])
async def tiers(node: CurrentNode) -> list[TierStatus]:
    """The tiers, fastest first."""
    return (await node.status()).tiers


@router.get("/v1/tiers/{tier}", tags=["status"], responses=documented(404))
async def tier(tier: TierName, node: CurrentNode) -> TierStatus:
    """One tier."""
    for found in (await node.status()).tiers:
        if found.medium == tier:
            return found
    raise Problem(404, "no-such-tier", f"this node has no {tier} tier")


@router.get("/v1/clients", tags=["status"])
async def clients(node: CurrentNode) -> list[ClientStatus]:
    """Who is connected to the node."""
    return (await node.status()).clients


@router.get("/v1/warmth", tags=["status"], responses=documented(404))
async def warmth(site: CurrentSite) -> WarmthStatus:
    """How warm the node is, by its last warm-up."""
    found = await asyncio.to_thread(read_warmth, site.config.node.directory)
    if found is None:
        raise Problem(404, "never-warmed", "this node was never warmed", "Start a job of kind warm, or kvstore warm.")
    return WarmthStatus.model_validate({**asdict(found), "share": found.share})
