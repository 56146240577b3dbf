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


Authenticate = Callable[[Request], Awaitable[Principal]]
"""Raises Problem (401) when the request does not say who it is from."""


async def everybody(_: Request) -> Principal:
    """No authentication: whoever reaches the loopback address."""
    return Principal("local", Role.ADMIN)


def require(who: Principal, role: Role) -> None:
    """Raises Problem (403)."""
    if not who.role.covers(role):
        raise Problem(403, "forbidden", f"{who.name} is {who.role}; this needs {role}", required_role=role)


def authorize(role: Role) -> Any:
    """The dependency of every route but health: the Principal, if it has ``role``; else Problem (401, 403)."""

    async def check(request: Request) -> Principal:
        principal: Principal = await request.app.state.site.authenticate(request)
        request.state.principal = principal  # for the audit log
        require(principal, role)
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


def reads(role: Role = Role.VIEWER) -> list[Any]:
    """``dependencies`` of a route that changes nothing."""
    return [authorize(role)]


def writes(role: Role) -> list[Any]:
    """``dependencies`` of a route that changes something: the audit log shows whoever asks for it, and what came of it."""
    return [Depends(_audited), authorize(role), Depends(_idempotency_key)]
