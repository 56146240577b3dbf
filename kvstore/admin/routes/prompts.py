"""What a prompt would find here, why it would not, and which prompts are hot."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from kvstore.admin.auth import reads
from kvstore.admin.models.prompts import (
    Explanation,
    HotPage,
    LookupAnswer,
    NodeLookup,
    Prompt,
    RoutedPrompt,
    RouterAnswer,
    RouterLookup,
    TierLookup,
)
from kvstore.admin.node import NodeView
from kvstore.admin.paging import Cursor, Limit, page_of
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentNode, CurrentSite, Site
from kvstore.errors import KVStoreError

router = APIRouter(prefix="/v1", tags=["prompts"], dependencies=reads(), responses=documented(422, 503, 504))


@router.post("/lookup", responses=documented(404, 409))
async def lookup(prompt: Prompt, node: CurrentNode) -> LookupAnswer:
    """How much of a prompt each tier of this node could serve now, and how fast. Does not count as a use."""
    return await _peek(node, prompt)


@router.post("/explain", responses=documented(404, 409))
async def explain(prompt: Prompt, node: CurrentNode) -> Explanation:
    """Why a prompt's blocks are found or missed: for each where it is, what happened to it, and what it is worth."""
    return Explanation.model_validate(await node.read("explain", **await node.about(prompt)))


@router.post("/router/lookup")
async def router_lookup(wanted: RouterLookup, site: CurrentSite, node: CurrentNode) -> RouterAnswer:
    """For each prompt and node, how many tokens of its prefix each tier could serve, and how fast."""
    return RouterAnswer(prompts=list(await asyncio.gather(*(_route(site, node, prompt) for prompt in wanted.prompts))))


@router.get("/hot", responses=documented(404, 409))
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


async def _peek(node: NodeView, prompt: Prompt) -> LookupAnswer:
    found = await node.peek(prompt)
    tiers = [
        TierLookup(
            medium=medium,
            usable_blocks=blocks,
            usable_tokens=blocks * found["block_tokens"],
            seconds=seconds,
            held_blocks=held,
        )
        for medium, blocks, seconds, held in found["tiers"]
    ]
    return LookupAnswer.model_validate({**found, "tiers": tiers})


async def _route(site: Site, node: NodeView, prompt: Prompt) -> RoutedPrompt:
    try:
        found = await _peek(node, prompt)
    except (KVStoreError, Problem) as error:
        return RoutedPrompt(blocks=0, block_tokens=0, nodes=[], problem=str(error))
    here = NodeLookup(node=site.name, url=site.url, tiers=found.tiers)
    return RoutedPrompt(blocks=found.blocks, block_tokens=found.block_tokens, nodes=[here])
