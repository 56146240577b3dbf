"""What a prompt would find here, why it would not, and which prompts are hot."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from kvstore.admin import routing
from kvstore.admin.auth import reads
from kvstore.admin.models.prompts import (
    Explanation,
    HotPage,
    LookupAnswer,
    Prompt,
    RouterAnswer,
    RouterLookup,
    RouterPeek,
    RouterPeeked,
)
from kvstore.admin.paging import Cursor, Limit, page_of
from kvstore.admin.problems import documented
from kvstore.admin.site import CurrentNode, CurrentSite

router = APIRouter(prefix="/v1", tags=["prompts"], responses=documented(422, 503, 504))


@router.post("/lookup", dependencies=reads(tenants=True), responses=documented(404, 409))
async def lookup(prompt: Prompt, node: CurrentNode) -> LookupAnswer:
    """How much of a prompt each tier of this node could serve now, and how fast. Does not count as a use."""
    return await routing.of_node(node, prompt)


@router.post("/explain", dependencies=reads(tenants=True), responses=documented(404, 409))
async def explain(prompt: Prompt, node: CurrentNode) -> Explanation:
    """Why a prompt's blocks are found or missed: for each where it is, what happened to it, and what it is worth."""
    return Explanation.model_validate(await node.read("explain", **await node.about(prompt)))


@router.post("/router/lookup", dependencies=reads())
async def router_lookup(wanted: RouterLookup, site: CurrentSite, node: CurrentNode) -> RouterAnswer:
    """For each prompt and node, how many tokens of its prefix each tier could serve, and how fast.

    Asks the nodes of `api.peers` too, all at once. Prompts named by a request or a key are looked up on this node alone.
    """
    return await routing.lookup(site, node, wanted)


@router.post("/router/peek", dependencies=reads())
async def router_peek(wanted: RouterPeek, site: CurrentSite, node: CurrentNode) -> RouterPeeked:
    """What each tier of this node could serve of chains of blocks, given by their keys: what peers ask each other."""
    found = await asyncio.gather(*(routing.peek(node, bytes.fromhex(chain)) for chain in wanted.chains))
    return RouterPeeked(node=site.name, chains=list(found))


@router.get("/hot", dependencies=reads(tenants=True), responses=documented(404, 409))
async def hot(
    node: CurrentNode,
    namespace: Annotated[str, Query(max_length=512, description="Model name, or start of a digest.")] = "",
    limit: Limit = 20,
    cursor: Cursor = "",
) -> HotPage:
    """The prompts that engines on this machine ask for most, best score first."""
    prompts = await node.hot()
    if namespace:
        digest = (await node.namespace(namespace)).digest
        prompts = [prompt for prompt in prompts if prompt.namespace == digest]
    items, after = page_of(prompts, lambda prompt: prompt.key, cursor, limit)
    return HotPage(items=items, cursor=after)
