"""What routes work with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from kvstore.admin.auth import Authenticate, everybody
from kvstore.admin.models import Check
from kvstore.admin.node import NodeView
from kvstore.admin.problems import Problem
from kvstore.config import Config, Loaded


@dataclass
class Site:
    """One running API. Extensions of other packages add to ``parts`` and ``checks``."""

    loaded: Loaded
    node: NodeView | None
    """None on a service that has no node beside it."""
    authenticate: Authenticate = everybody
    parts: dict[str, Callable[[], Awaitable[Any]]] = field(default_factory=dict)
    """What ``/v1/events`` tells each second, by name: anything with a JSON form, quickly."""
    checks: list[Callable[[], Awaitable[Check]]] = field(default_factory=list)
    """What must be well for ``/readyz``."""
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server stops: streams end then."""

    @property
    def config(self) -> Config:
        return self.loaded.config


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


def _node(request: Request) -> NodeView:
    node = _site(request).node
    if node is None:
        raise Problem(404, "no-node", "this service has no node beside it", "Ask the API of a node.")
    return node


CurrentSite = Annotated[Site, Depends(_site)]
CurrentNode = Annotated[NodeView, Depends(_node)]
