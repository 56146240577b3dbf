"""The region of this node: its catalog, and who else is in it."""

from __future__ import annotations

import socket

from fastapi import APIRouter

from kvstore.admin.auth import reads
from kvstore.admin.models.status import CatalogInfo, NodeInfo
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite, Site
from kvstore.errors import KVStoreError

router = APIRouter(prefix="/v1", tags=["status"], dependencies=reads())

HEARTBEAT = "node/"


@router.get("/catalog", responses=documented(404, 503))
async def catalog(site: CurrentSite) -> CatalogInfo:
    """The index of the region's bucket that its nodes share."""
    if site.catalog is None:
        raise Problem(404, "no-catalog", "no catalog is configured", "Set catalog.url.")
    return await site.catalog.status()


@router.get("/nodes", responses=documented(503))
async def nodes(site: CurrentSite) -> list[NodeInfo]:
    """The nodes of the region, by what the catalog has heard of them lately; without one, the node here."""
    here = NodeInfo(name=site.name, here=True, url=site.url)
    if site.catalog is None:
        return [here]
    mark = await _own_heartbeat(site)
    found = [
        here.model_copy(update={"expires": claim.expires})
        if mark and claim.name.startswith(mark)
        else NodeInfo(name=claim.name.removeprefix(HEARTBEAT), here=False, expires=claim.expires)
        for claim in (await site.catalog.status()).claims
        if claim.name.startswith(HEARTBEAT)
    ]
    return found if site.node is None or any(node.here for node in found) else [here, *found]


async def _own_heartbeat(site: Site) -> str:
    """How the claim of the node here begins; empty while there is none."""
    try:
        return f"{HEARTBEAT}{socket.gethostname()}:{(await site.node.status()).pid}:" if site.node is not None else ""
    except KVStoreError:
        return ""
