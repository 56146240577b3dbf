"""Models, and everything else that shapes a block's bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

from fastapi import APIRouter, Path

from kvstore.admin.auth import Role, reads, writes
from kvstore.admin.models.base import DIGEST_EXAMPLE
from kvstore.admin.models.blocks import Deleted
from kvstore.admin.models.status import ModelInfo, NamespaceInfo, NamespacePage
from kvstore.admin.node import WORK_SECONDS
from kvstore.admin.paging import Cursor, Limit, page_of
from kvstore.admin.problems import documented
from kvstore.admin.site import CurrentNode

router = APIRouter(prefix="/v1", tags=["namespaces"], responses=documented(422, 503, 504))

Digest = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Whole digest.", examples=[DIGEST_EXAMPLE])]


@router.get("/namespaces", dependencies=reads(tenants=True))
async def list_namespaces(node: CurrentNode, limit: Limit = 100, cursor: Cursor = "") -> NamespacePage:
    """The namespaces that this node knows, by digest."""
    spaces = sorted((await node.status()).namespaces, key=lambda space: space.digest)
    items, after = page_of(spaces, lambda space: space.digest, cursor, limit)
    return NamespacePage(items=items, cursor=after)


@router.get("/namespaces/{digest}", dependencies=reads(tenants=True), responses=documented(404))
async def show_namespace(digest: Digest, node: CurrentNode) -> NamespaceInfo:
    """One namespace."""
    return await node.namespace(digest)


@router.delete("/namespaces/{digest}/blocks", dependencies=writes(Role.ADMIN, tenants=True), responses=documented(404))
async def delete_namespace_blocks(digest: Digest, node: CurrentNode) -> Deleted:
    """Delete every block of a namespace from every tier of this node, the region's bucket included."""
    space = await node.namespace(digest)
    return Deleted.model_validate(
        await node.change("delete", WORK_SECONDS, namespace=bytes.fromhex(space.digest), **space.asked_of)
    )


@router.get("/models", dependencies=reads(tenants=True))
async def list_models(node: CurrentNode) -> list[ModelInfo]:
    """The models that this node knows, by name."""
    by_model: defaultdict[str, list[NamespaceInfo]] = defaultdict(list)
    for space in (await node.status()).namespaces:
        by_model[space.model].append(space)
    return [
        ModelInfo(
            model=model,
            namespaces=sorted(space.digest for space in spaces),
            tenants=sorted({str(space.fields.get("tenant", "")) for space in spaces}),
            dtypes=sorted({str(space.fields.get("dtype", "")) for space in spaces}),
        )
        for model, spaces in sorted(by_model.items())
    ]
