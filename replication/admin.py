"""What a region adds to the admin API: routes under ``/v1/replication``, and jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter

from kvstore.admin.auth import Principal, Role, authorize, reads, writes
from kvstore.admin.cached import Cached
from kvstore.admin.models.replication import (
    ChainKeys,
    FlowInfo,
    Paused,
    RegionHolding,
    RegionInfo,
    ReplicationStatus,
    Sources,
    TopologyInfo,
)
from kvstore.admin.models.status import Check
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import Site as ApiSite
from kvstore.errors import ConfigError, KVStoreError
from kvstore.identity import KEY_BYTES, BlockKey
from replication import adminjobs, purgejob
from replication.adminproof import proof_router
from replication.holdings import Holding, Holdings
from replication.links import Links
from replication.pause import pause, read_pauses, resume
from replication.site import Site
from replication.status import look
from replication.topology import Topology, load_topology

STATUS_SECONDS = 5.0
"""How old a status may be: it takes some ten requests to the bucket."""


def extend(api: ApiSite) -> APIRouter | None:
    """Entry point of the group ``kvstore.admin``. Raises ConfigError."""
    config = api.config
    if api.node is not None and config.object.url:
        api.jobs.register(adminjobs.warm_kind(config))
    if config.region.topology is None:
        if config.object.url:
            api.jobs.register(purgejob.purge_kind(Site(config)))
            return proof_router(Site(config))
        return None
    topology, name = load_topology(config.region.topology), config.region.name
    if name not in topology.regions:
        raise ConfigError("region.name", name, "not in the topology", f"There are: {', '.join(topology.regions)}.")
    region = Region(Site(config, topology, name), topology, name)
    api.jobs.register(adminjobs.plan_kind(region.site))
    api.jobs.register(adminjobs.resync_kind(region.site))
    api.jobs.register(purgejob.purge_kind(region.site))
    api.parts["replication"] = region.status
    if api.node is None:
        api.checks.append(region.answers)
    router = APIRouter()
    router.include_router(region.router())
    router.include_router(proof_router(region.site))
    return router


class Region:
    """This region, as its bucket tells of it."""

    def __init__(self, site: Site, topology: Topology, name: str) -> None:
        self.site = site
        self.name = name
        self._topology = topology
        self._sources = list(dict.fromkeys(flow.source for flow in topology.flows_to(name)))
        self.status = Cached(self._status, STATUS_SECONDS)
        self._holdings = Holdings(site.links)

    async def answers(self) -> Check:
        """Whether the bucket does."""
        try:
            await self.status()
        except KVStoreError as error:
            return Check(name="bucket", ok=False, detail=str(error))
        return Check(name="bucket", ok=True, detail="answers")

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/replication", tags=["replication"], responses=documented(503))

        @router.get("", dependencies=reads(), name="replication")
        async def status() -> ReplicationStatus:
            """Lag, costs and problems of every source, leases, and the region's own manifest. Some seconds old."""
            return await self.status()

        @router.get("/topology", dependencies=reads(), name="topology")
        def topology() -> TopologyInfo:
            """Regions and flows."""
            return describe(self._topology, self.name)

        @router.post("/pause", dependencies=writes(Role.OPERATOR), responses=documented(404), name="pause_replication")
        async def pause_sources(wanted: Sources, who: Annotated[Principal, authorize(Role.OPERATOR)]) -> Paused:
            """Copy nothing from sources from the next round on, in any process of the region. Purges arrive all the same."""
            sources = self._known(wanted)
            async with self._bucket() as bucket:
                return _paused(await pause(bucket, sources, who.name))

        @router.post(
            "/resume", dependencies=writes(Role.OPERATOR), responses=documented(404), name="resume_replication"
        )
        async def resume_sources(wanted: Sources) -> Paused:
            """Go on."""
            sources = self._known(wanted)
            async with self._bucket() as bucket:
                return _paused(await resume(bucket, sources))

        @router.post("/holdings", dependencies=reads(), name="holdings")
        async def holdings(wanted: ChainKeys) -> list[RegionHolding]:
            """What this region and those that it pulls from have of a chain, by their manifests: a minute or so ago."""
            joined = bytes.fromhex(wanted.keys)
            chain = [BlockKey(joined[at : at + KEY_BYTES]) for at in range(0, len(joined), KEY_BYTES)]
            return [_holding(one) for one in await self._holdings.of(chain)]

        return router

    def _known(self, wanted: Sources) -> list[str]:
        for source in wanted.sources:
            if source not in self._sources:
                remedy = f"There are: {', '.join(self._sources) or 'none'}."
                detail = f"nothing flows from {source!r} to {self.name}"
                raise Problem(404, "no-such-source", detail, remedy, sources=self._sources)
        return wanted.sources or self._sources

    async def _status(self) -> ReplicationStatus:
        async with self._bucket() as bucket:
            found, paused = await asyncio.gather(look(bucket, self._topology, self.name), read_pauses(bucket))
        for source, row in found["sources"].items():
            row["paused"] = str(paused.get(source, ""))
        return ReplicationStatus.model_validate(found)

    @asynccontextmanager
    async def _bucket(self) -> AsyncIterator[Links]:
        async with Links.open(self.site.links) as bucket:
            yield bucket


def describe(topology: Topology, name: str) -> TopologyInfo:
    """What operators may see of a topology."""
    return TopologyInfo(
        region=name,
        mode=topology.mode,
        regions=[
            RegionInfo(
                name=other,
                url=table.url,
                endpoints=list(table.endpoints),
                location=table.location,
                publishes=bool(table.public_key),
            )
            for other, table in topology.regions.items()
        ],
        flows=[FlowInfo.model_validate(flow.model_dump()) for flow in topology.flows],
    )


def _holding(found: Holding) -> RegionHolding:
    edges = np.flatnonzero(np.diff(found.held, prepend=False, append=False)).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    prefix = runs[0][1] if runs and runs[0][0] == 0 else 0
    return RegionHolding(
        region=found.region, published=found.published, blocks=int(found.held.sum()), prefix=prefix, runs=runs
    )


def _paused(pauses: dict[str, Any]) -> Paused:
    return Paused(paused={source: str(one) for source, one in pauses.items()})
