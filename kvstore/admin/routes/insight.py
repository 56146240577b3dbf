"""What prompts have in common."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from kvstore.admin.auth import reads
from kvstore.admin.models.insight import Branch, BreakerReport, Tree
from kvstore.admin.models.prompts import Prompt
from kvstore.admin.node import NodeView
from kvstore.admin.problems import documented
from kvstore.admin.site import CurrentNode
from kvstore.admin.tree import Segment, grow
from kvstore.errors import BlockNotFound
from kvstore.identity import KEY_BYTES

router = APIRouter(
    prefix="/v1", tags=["prompts"], dependencies=reads(tenants=True), responses=documented(422, 503, 504)
)

COMPARED = 20
"""Hot prompts that a tree is made of."""
BLOCKS = 1000
"""Of each, from its beginning."""

ASKED = "asked"


@router.post("/tree", responses=documented(404, 409))
async def tree(prompt: Prompt, node: CurrentNode) -> Tree:
    """A prompt's chain and the hot prompts that begin as it does, as a tree: which blocks they share and where those are."""
    asked = await node.read("where", **await node.about(prompt), start=0, count=BLOCKS)
    keys, last = _keys(asked), asked["keys"][-KEY_BYTES:].hex()
    hot = [one.key for one in await node.hot() if one.namespace == asked["namespace"].hex() and one.key != last]
    found = await asyncio.gather(*(_chain(node, key) for key in hot[:COMPARED]))
    chains = {ASKED: keys} | {key: _keys(one) for key, one in zip(hot, found, strict=False) if one is not None}
    media: dict[bytes, list[str]] = {}
    for one in (asked, *found):
        if one is not None:
            media |= dict(zip(_keys(one), one["media"], strict=True))
    root = next((segment for segment in grow(chains) if ASKED in segment.through), None)
    return Tree(
        namespace=asked["namespace"].hex(),
        block_tokens=asked["block_tokens"],
        blocks=asked["blocks"],
        compared=len(chains) - 1,
        root=None if root is None else _branch(root, media, last),
    )


@router.get("/breakers")
async def breakers(node: CurrentNode) -> BreakerReport:
    """Where prompts of recent traffic part early, and how many tokens could be shared if what parts them came later."""
    return await node.breakers()


async def _chain(node: NodeView, key: str) -> Any:
    """What the node says of a hot prompt; None when it is gone by now."""
    try:
        return await node.read("where", key=bytes.fromhex(key), start=0, count=BLOCKS)
    except BlockNotFound:
        return None


def _keys(found: Any) -> list[bytes]:
    return [found["keys"][at : at + KEY_BYTES] for at in range(0, len(found["keys"]), KEY_BYTES)]


def _branch(segment: Segment, media: dict[bytes, list[str]], last: str) -> Branch:
    held: dict[Any, int] = {}
    for key in segment.keys:
        for medium in media[key]:
            held[medium] = held.get(medium, 0) + 1
    return Branch(
        start=segment.start,
        end=segment.end,
        key=segment.keys[-1].hex(),
        held=held,
        prompts=len(segment.through),
        asked=ASKED in segment.through,
        ends=[last if name == ASKED else name for name in segment.ends],
        children=[_branch(child, media, last) for child in segment.children],
    )
