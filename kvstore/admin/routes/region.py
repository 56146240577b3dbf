"""The region of this node: its catalog, and who else is in it."""

from __future__ import annotations

from fastapi import APIRouter

from kvstore.admin.auth import reads
from kvstore.admin.models.status import CatalogInfo, NodeInfo
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite

router = APIRouter(prefix="/v1", tags=["status"], dependencies=reads())


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
    found = [
        NodeInfo(
            name=node.name,
            here=node.name == site.name,
            url=site.url if node.name == site.name else node.api,
            region=node.region,
            started=node.started,
            expires=node.expires,
        )
        for node in await site.catalog.nodes()
    ]
    return found if site.node is None or any(node.here for node in found) else [here, *found]
