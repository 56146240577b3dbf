"""What routes work with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.encoders import jsonable_encoder
from prometheus_client import CollectorRegistry

from kvstore.admin.auth import Authenticate, Principal, everybody
from kvstore.admin.cached import Cached
from kvstore.admin.catalog import CatalogView
from kvstore.admin.jobs import Jobs
from kvstore.admin.models.status import Check, Snapshot
from kvstore.admin.node import NodeView
from kvstore.admin.peers import Peers
from kvstore.admin.problems import Problem
from kvstore.admin.regionjobs import RegionJobs
from kvstore.config import Config, Loaded
from kvstore.errors import KVStoreError

SNAPSHOT_SECONDS = 1.0
"""How often live views are told."""


@dataclass
class Site:
    """One running API. Extensions of other packages add to ``parts`` and ``checks``."""

    loaded: Loaded
    node: NodeView | None
    """None on a service that has no node beside it."""
    jobs: Jobs
    name: str
    """Of the node, or of the service."""
    url: str
    """Where this API is, as others on this machine reach it."""
    peers: Peers = field(default_factory=Peers)
    """Other nodes, for routers."""
    catalog: CatalogView | None = None
    """The region's, if one is configured."""
    registry: CollectorRegistry | None = None
    """The metrics of a service that has no node beside it."""
    authenticate: Authenticate = everybody
    parts: dict[str, Callable[[], Awaitable[Any]]] = field(default_factory=dict)
    """What ``/v1/events`` tells each second, by name: anything with a JSON form, quickly."""
    checks: list[Callable[[], Awaitable[Check]]] = field(default_factory=list)
    """What must be well for ``/readyz``."""
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server stops: streams end then."""

    def __post_init__(self) -> None:
        self.snapshot = Cached(self._look, 0.9 * SNAPSHOT_SECONDS)
        self.all_jobs = RegionJobs(self.jobs, self.catalog, self.url)

    @property
    def config(self) -> Config:
        return self.loaded.config

    async def _look(self) -> Snapshot:
        """All parts at once; one that fails does not keep the others back."""
        found: dict[str, Any] = {}
        problems: dict[str, str] = {}

        async def ask(name: str) -> None:
            try:
                found[name] = jsonable_encoder(await self.parts[name]())
            except (KVStoreError, Problem) as error:
                problems[name] = str(error)

        await asyncio.gather(*map(ask, self.parts))
        return Snapshot(time=time.time(), parts=found, problems=problems)


async def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


async def _whole_node(request: Request) -> NodeView:
    node = (await _site(request)).node
    if node is None:
        raise Problem(404, "no-node", "this service has no node beside it", "Ask the API of a node.")
    return node


async def _node(request: Request) -> NodeView:
    node = await _whole_node(request)
    who: Principal | None = getattr(request.state, "principal", None)
    return node.within(who.tenant) if who is not None and who.tenant else node


CurrentSite = Annotated[Site, Depends(_site)]
CurrentNode = Annotated[NodeView, Depends(_node)]
"""As whoever asks may see it: the whole node, or one tenant's part."""
WholeNode = Annotated[NodeView, Depends(_whole_node)]
"""Whoever asks."""
