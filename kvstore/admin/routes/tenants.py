"""The tenants of a node. The book is changed here, in the API's process; the node follows at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Request

from kvstore.admin.auth import Role, reads, writes
from kvstore.admin.models.tenants import (
    CreatedTenant,
    NewSecret,
    NewTenant,
    Removed,
    RotatedSecret,
    RotatedToken,
    TenantChange,
    TenantInfo,
    TenantPage,
    TenantPurge,
)
from kvstore.admin.node import WORK_SECONDS, NodeView
from kvstore.admin.paging import Cursor, Limit, page_of
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite, WholeNode
from kvstore.errors import DeadlineExceeded, NodeUnavailable
from kvstore.tenants.book import NAME, Tenant, TenantBook

router = APIRouter(prefix="/v1/tenants", tags=["tenants"], responses=documented(404, 422, 503, 504))

PURGE = "purge"
"""The kind of job that deletes everywhere, where there is a bucket."""

T = TypeVar("T")


async def _book(site: CurrentSite) -> TenantBook:
    path = site.config.tenants.book
    if path is None:
        raise Problem(404, "one-tenant", "this node has one tenant, identity.tenant", "Set tenants.book for several.")
    return TenantBook(path)


Book = Annotated[TenantBook, Depends(_book)]


async def _own(name: Annotated[str, Path(pattern=NAME, examples=["acme"])], request: Request) -> None:
    """Raises Problem (404) for whoever is limited to another tenant: it hears of no other."""
    if request.state.principal.tenant not in ("", name):
        raise _unknown(name)


Name = Annotated[str, Path(pattern=NAME, description="Of the tenant.", examples=["acme"])]
OWN = Depends(_own)


@router.get("", dependencies=reads())
async def list_tenants(book: Book, node: WholeNode, limit: Limit = 100, cursor: Cursor = "") -> TenantPage:
    """The tenants of this node, by name, with what they hold. Without secrets."""
    tenants, held = await asyncio.to_thread(book.tenants), await _held(node)
    items, after = page_of(tenants, lambda tenant: tenant.name, cursor, limit)
    return TenantPage(items=[_info(tenant, held) for tenant in items], cursor=after)


@router.post("", dependencies=writes(Role.ADMIN), status_code=201, responses=documented(409))
async def create_tenant(wanted: NewTenant, book: Book, node: WholeNode) -> CreatedTenant:
    """Make a tenant. Its token and its secret are in this answer and nowhere else; sent again under the same Idempotency-Key, the
    answer is repeated for a day."""
    if await asyncio.to_thread(book.get, wanted.name) is not None:
        raise Problem(409, "tenant-exists", f"there is a tenant {wanted.name!r} already", "See /v1/tenants.")
    secret = bytes.fromhex(wanted.secret)
    tenant, token = await _change(
        node, lambda: book.create(wanted.name, tuple(wanted.uids), wanted.quota, wanted.shares, secret)
    )
    return CreatedTenant(name=tenant.name, token=token, secret=tenant.secret)


@router.get("/{name}", dependencies=[*reads(tenants=True), OWN])
async def show_tenant(name: Name, book: Book, node: WholeNode) -> TenantInfo:
    """One tenant."""
    return _info(await _known(book, name), await _held(node))


@router.patch("/{name}", dependencies=writes(Role.ADMIN))
async def change_tenant(name: Name, change: TenantChange, book: Book, node: WholeNode) -> TenantInfo:
    """Other users or quotas. A lower quota of the disk is kept at once; for another one of host memory engines connect anew."""
    await _known(book, name)
    uids = None if change.uids is None else tuple(change.uids)
    tenant = await _change(node, lambda: book.change(name, uids, change.quota))
    return _info(tenant, await _held(node))


@router.delete("/{name}", dependencies=writes(Role.ADMIN))
async def remove_tenant(name: Name, book: Book, node: WholeNode) -> Removed:
    """End a tenant on this node: its engines are cut off. Its blocks stay until they are pushed out, or purged."""
    await _known(book, name)
    await _change(node, lambda: book.remove(name))
    return Removed(name=name)


@router.post("/{name}/rotate-secret", dependencies=[*writes(Role.ADMIN, tenants=True), OWN])
async def rotate_secret(name: Name, wanted: NewSecret, book: Book, node: WholeNode) -> RotatedSecret:
    """Give a tenant another secret. From now on nobody asks for what it has stored: it ages out, or is purged."""
    await _known(book, name)
    tenant = await _change(node, lambda: book.rotate_secret(name, bytes.fromhex(wanted.secret)))
    return RotatedSecret(name=name, secret=tenant.secret)


@router.post("/{name}/rotate-token", dependencies=[*writes(Role.ADMIN, tenants=True), OWN])
async def rotate_token(name: Name, book: Book, node: WholeNode) -> RotatedToken:
    """Give a tenant another token. Engines with the one before are cut off."""
    await _known(book, name)
    return RotatedToken(name=name, token=await _change(node, lambda: book.rotate_token(name)))


@router.post("/{name}/purge", dependencies=[*writes(Role.ADMIN, tenants=True), OWN], responses=documented(409))
async def purge_tenant(name: Name, book: Book, node: WholeNode, site: CurrentSite) -> TenantPurge:
    """Delete all blocks of a tenant: on this node at once, in the bucket, on other nodes and in other regions by a job. Also of a
    tenant that is in the book no more."""
    tenant = await asyncio.to_thread(book.get, name)
    if tenant is not None and tenant.shares:
        problem = f"{name} has no blocks of its own: it shares those of {tenant.shares}"
        raise Problem(409, "shares-blocks", problem, f"Purge {tenant.shares}, or remove {name}.")
    everywhere = any(kind.name == PURGE for kind in site.jobs.kinds)
    job = site.jobs.create(PURGE, {"tenant": name}).id if everywhere else None
    done = await node.change("purge_tenant", WORK_SECONDS, name=name)
    return TenantPurge(name=name, **done, job=job)


async def _known(book: TenantBook, name: str) -> Tenant:
    tenant = await asyncio.to_thread(book.get, name)
    if tenant is None:
        raise _unknown(name)
    return tenant


def _unknown(name: str) -> Problem:
    return Problem(404, "no-such-tenant", f"there is no tenant {name!r} here", "See /v1/tenants.")


async def _change(node: NodeView, change: Callable[[], T]) -> T:
    """Change the book, and have the node follow: it does so by itself within a second when it does not answer now."""
    changed = await asyncio.to_thread(change)
    with suppress(NodeUnavailable, DeadlineExceeded):
        await node.change("follow_tenants", WORK_SECONDS)
    return changed


async def _held(node: NodeView) -> dict[str, dict[str, Any]]:
    """By tenant, what the node says of those that it serves: nobody while it does not answer."""
    with suppress(NodeUnavailable, DeadlineExceeded):
        return {one["name"]: one for one in (await node.read("tenants"))["tenants"]}
    return {}


def _info(tenant: Tenant, held: dict[str, dict[str, Any]]) -> TenantInfo:
    here = held.get(tenant.shares or tenant.name)
    known = tenant.model_dump(include={"name", "uids", "shares", "quota", "created", "rotated"})
    own = {} if here is None or tenant.shares else {"clients": here["clients"], "tiers": here["tiers"]}
    return TenantInfo(**known, served=here is not None, **own)
