"""Who may do what. Each route names the role it needs; ``Site.authenticate`` says who asks.

Without ``api.tokens`` or ``api.oidc_issuer`` the API listens on loopback only (``ApiSection`` refuses anything else) and
everybody is an admin, as everybody who reaches the node's socket is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from kvstore.admin.problems import Problem


class Role(StrEnum):
    """Each may do what the ones before it may."""

    VIEWER = "viewer"
    """Reads."""
    OPERATOR = "operator"
    """Also pins, verifies, runs jobs, changes policies."""
    ADMIN = "admin"
    """Also deletes."""

    def covers(self, wanted: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(wanted)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    role: Role
    tenant: str = ""
    """The one it may see and change; empty: all, and the node itself."""


Authenticate = Callable[[Request], Awaitable[Principal]]
"""Raises Problem (401) when the request does not say who it is from."""


async def everybody(_: Request) -> Principal:
    """No authentication: whoever reaches the loopback address."""
    return Principal("local", Role.ADMIN)


def require(who: Principal, role: Role) -> None:
    """Raises Problem (403)."""
    if not who.role.covers(role):
        raise Problem(403, "forbidden", f"{who.name} is {who.role}; this needs {role}", required_role=role)


def authorize(role: Role, tenants: bool = False) -> Any:
    """The dependency of every route but health: the Principal, if it has ``role``; else Problem (401, 403).

    A principal of one tenant may use routes for ``tenants`` only: what they work with, ``CurrentNode``, is that tenant's part.
    """

    async def check(request: Request) -> Principal:
        site = request.app.state.site
        principal: Principal = await site.authenticate(request)
        request.state.principal = principal  # for the audit log, and CurrentNode
        require(principal, role)
        if principal.tenant and (not tenants or site.config.tenants.book is None):
            detail = f"{principal.name} is limited to tenant {principal.tenant}; this is about more than that"
            raise Problem(403, "forbidden", detail, tenant=principal.tenant)
        return principal

    return Depends(check)


async def _audited(request: Request) -> None:
    request.state.audited = True


def _idempotency_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            max_length=255,
            description="Any text that names this write. Sent again with it, the write is not done again: "
            "its answer is repeated.",
            examples=["4f9c2a5e-restart-42"],
        ),
    ] = None,
) -> None:
    """Only for the document: ``kvstore.admin.idempotency`` does the work."""


def reads(role: Role = Role.VIEWER, tenants: bool = False) -> list[Any]:
    """``dependencies`` of a route that changes nothing."""
    return [authorize(role, tenants)]


def writes(role: Role, tenants: bool = False) -> list[Any]:
    """``dependencies`` of a route that changes something: the audit log shows whoever asks for it, and what came of it."""
    return [Depends(_audited), authorize(role, tenants), Depends(_idempotency_key)]
