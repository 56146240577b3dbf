"""What tiers hold, and doing something about it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from kvstore.admin.auth import Role, reads, writes
from kvstore.admin.models.base import KEY_EXAMPLE, Key, TierName
from kvstore.admin.models.blocks import (
    Block,
    BlockInfo,
    BlockPage,
    Deleted,
    Evicted,
    Eviction,
    NewPin,
    Pin,
    Pinned,
    PromptBlock,
    PromptBlocks,
    PromptBlocksQuery,
    SomeBlocks,
    Unpinned,
    Verified,
    VerifiedTier,
)
from kvstore.admin.node import WORK_SECONDS, NodeView
from kvstore.admin.paging import Cursor, Limit, decode_cursor, encode_cursor
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentNode
from kvstore.identity import KEY_BYTES

router = APIRouter(prefix="/v1", tags=["blocks"], responses=documented(422, 503, 504))

PathKey = Annotated[Key, Path(description="Block key, 32 hexadecimal digits.", examples=[KEY_EXAMPLE])]


@router.get("/blocks", dependencies=reads(tenants=True), responses=documented(404, 409))
async def list_blocks(
    node: CurrentNode,
    tier: Annotated[TierName, Query(description="Whose blocks.")],
    namespace: Annotated[str, Query(max_length=512, description="Model name, or start of a digest.")] = "",
    prefix: Annotated[str, Query(pattern="^([0-9a-f]{2}){0,16}$", description="Only keys that start so.")] = "",
    limit: Limit = 100,
    cursor: Cursor = "",
) -> BlockPage:
    """Blocks of a tier, by key. A page may be short, even empty, and yet have a cursor: filters look at one page at a time."""
    digest = bytes.fromhex((await node.namespace(namespace)).digest) if namespace else None
    after = _position(cursor)
    page = await node.read(
        "list",
        WORK_SECONDS,
        medium=tier.value,
        namespace=digest,
        prefix=bytes.fromhex(prefix),
        cursor=after,
        limit=limit,
    )
    items = [Block.model_validate(block) for block in page["blocks"]]
    return BlockPage(items=items, cursor=encode_cursor(page["cursor"]))


@router.post("/blocks/query", dependencies=reads(tenants=True), responses=documented(404, 409))
async def query_blocks(query: PromptBlocksQuery, node: CurrentNode) -> PromptBlocks:
    """The blocks of a prompt in chain order, and where each is. Does not count as a use."""
    after = decode_cursor(query.cursor)
    if len(after) > 4:
        raise Problem(422, "invalid-cursor", "cursor is not one that this API gave")
    start = int.from_bytes(after)
    found = await node.read("where", **await node.about(query.prompt), start=start, count=query.limit)
    keys = [found["keys"][at : at + KEY_BYTES] for at in range(0, len(found["keys"]), KEY_BYTES)]
    items = [
        PromptBlock(index=start + at, key=key, media=media)
        for at, (key, media) in enumerate(zip(keys, found["media"], strict=True))
    ]
    end = start + len(items)
    return PromptBlocks(
        **_found(found), items=items, cursor=encode_cursor(end.to_bytes(4)) if end < found["blocks"] else ""
    )


@router.post("/blocks/evict", dependencies=writes(Role.OPERATOR, tenants=True), responses=documented(404, 409))
async def evict_blocks(wanted: Eviction, node: CurrentNode) -> Evicted:
    """Have one tier give blocks up. The other tiers keep theirs; a block that only this one held is gone."""
    done = await node.change("evict", WORK_SECONDS, medium=wanted.tier.value, **await _named(wanted, node))
    return Evicted(evicted=done["evicted"])


@router.post("/blocks/delete", dependencies=writes(Role.ADMIN, tenants=True), responses=documented(404, 409))
async def delete_blocks(wanted: SomeBlocks, node: CurrentNode) -> Deleted:
    """Delete blocks from every tier, the region's bucket included. Other nodes' copies in memory and on disk stay."""
    if wanted.prompt is None:
        keys = b"".join(map(bytes.fromhex, wanted.keys or ()))
    else:
        keys = await _all_keys(node, await node.about(wanted.prompt))
    return Deleted.model_validate(await node.change("delete", WORK_SECONDS, keys=keys))


@router.get("/blocks/{key}", dependencies=reads(tenants=True), responses=documented(404))
async def show_block(key: PathKey, node: CurrentNode) -> BlockInfo:
    """One block."""
    return await _inspect(key, node)


@router.delete("/blocks/{key}", dependencies=writes(Role.ADMIN, tenants=True))
async def delete_block(key: PathKey, node: CurrentNode) -> Deleted:
    """Delete one block from every tier."""
    return Deleted.model_validate(await node.change("delete", WORK_SECONDS, keys=bytes.fromhex(key)))


@router.post("/blocks/{key}/verify", dependencies=writes(Role.OPERATOR, tenants=True), responses=documented(404))
async def verify_block(key: PathKey, node: CurrentNode) -> Verified:
    """Read every copy of a block and check it. A bad one is dropped and quarantined."""
    tiers = []
    for tier in (await _inspect(key, node)).media:
        page = await node.change("verify", WORK_SECONDS, medium=tier.value, keys=bytes.fromhex(key))
        if page["checked"] or page["bad"]:  # else it went meanwhile
            reason = page["bad"][0]["reason"] if page["bad"] else ""
            tiers.append(VerifiedTier(tier=tier, ok=not page["bad"], reason=reason))
    return Verified(key=key, tiers=tiers)


@router.get("/pins", dependencies=reads(tenants=True))
async def list_pins(node: CurrentNode) -> list[Pin]:
    """What is pinned, by deadline."""
    return [Pin.model_validate(pin) for pin in (await node.read("pins"))["pins"]]


@router.post("/pins", dependencies=writes(Role.OPERATOR, tenants=True), status_code=201, responses=documented(404, 409))
async def pin(wanted: NewPin, node: CurrentNode) -> Pinned:
    """Keep a prompt until a deadline. A wish, not a lock: a tier with nothing else to give up gives up pinned blocks too."""
    return Pinned.model_validate(await node.change("pin", **await node.about(wanted.prompt), seconds=wanted.seconds))


@router.delete("/pins/{key}", dependencies=writes(Role.OPERATOR, tenants=True), responses=documented(404))
async def unpin(key: PathKey, node: CurrentNode) -> Unpinned:
    """End the pins of the prompt that ends in a block."""
    return Unpinned.model_validate(await node.change("unpin", key=bytes.fromhex(key)))


async def _inspect(key: str, node: NodeView) -> BlockInfo:
    known = await node.read("inspect", key=bytes.fromhex(key))
    if not known["media"]:
        raise Problem(404, "block-not-found", f"no tier of the node holds {key}", "Ask /v1/explain why.")
    return BlockInfo.model_validate(known)


async def _named(wanted: SomeBlocks, node: NodeView) -> dict[str, Any]:
    if wanted.prompt is not None:
        return await node.about(wanted.prompt)
    return {"keys": b"".join(map(bytes.fromhex, wanted.keys or ()))}


async def _all_keys(node: NodeView, named: dict[str, Any]) -> bytes:
    """Of a prompt, its tail first: what breaks off in between leaves no block without those before it."""
    keys: list[bytes] = []
    while True:
        found = await node.read("where", **named, start=len(keys), count=1000)
        keys += [found["keys"][at : at + KEY_BYTES] for at in range(0, len(found["keys"]), KEY_BYTES)]
        if len(keys) >= found["blocks"]:
            return b"".join(reversed(keys))


def _position(cursor: str) -> bytes:
    after = decode_cursor(cursor)
    if len(after) not in (0, KEY_BYTES):
        raise Problem(422, "invalid-cursor", "cursor is not one that this API gave")
    return after


def _found(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: answer[name] for name in ("namespace", "block_tokens", "blocks")}
