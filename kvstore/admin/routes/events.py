"""What a dashboard shows, once or each second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse, ServerSentEvent

from kvstore.admin.auth import reads
from kvstore.admin.models.status import Snapshot
from kvstore.admin.routes import blocks, region
from kvstore.admin.site import SNAPSHOT_SECONDS, CurrentSite, Site
from kvstore.warmth import read_warmth

router = APIRouter(prefix="/v1", tags=["observability"], dependencies=reads())

SHOWN = 20
"""Hot prompts and jobs in a snapshot."""


@router.get("/snapshot")
async def snapshot(site: CurrentSite) -> Snapshot:
    """What `/v1/events` tells, once."""
    return await site.snapshot()


@router.get("/events", response_class=EventSourceResponse)
async def events(site: CurrentSite) -> AsyncIterator[ServerSentEvent]:
    """A server-sent event of type `snapshot` each second. All who listen share one look at the node."""
    while not site.closing.is_set():
        yield ServerSentEvent(event="snapshot", data=await site.snapshot())
        try:
            await asyncio.wait_for(site.closing.wait(), SNAPSHOT_SECONDS)
        except TimeoutError:
            pass


def add_parts(site: Site) -> None:
    """What every snapshot has."""
    node = site.node

    async def jobs() -> Any:
        return (await site.all_jobs.all())[:SHOWN]

    async def hot() -> Any:
        return (await node.hot())[:SHOWN] if node is not None else []

    async def pins() -> Any:
        return (await blocks.list_pins(node))[:SHOWN] if node is not None else []

    async def nodes() -> Any:
        return await region.nodes(site)

    async def warmth() -> Any:
        found = await asyncio.to_thread(read_warmth, site.config.node.directory)
        return found and {**asdict(found), "share": found.share}

    site.parts |= {"jobs": jobs, "nodes": nodes}
    if node is not None:
        site.parts |= {"node": node.status, "hot": hot, "pins": pins, "warmth": warmth}
