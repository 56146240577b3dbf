"""Is it alive, is it ready. Without authorization: probes have no token."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

import kvstore
from kvstore.admin.models.status import Check, Health, Readiness
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite, Site
from kvstore.errors import KVStoreError
from kvstore.warmth import read_warmth

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """Whether this API answers, whatever the node does."""
    return Health(status="ok", version=kvstore.__version__)


@router.get("/readyz", responses=documented(503))
async def readyz(site: CurrentSite) -> Readiness:
    """Whether traffic may come: the node answers, does not drain and, with `api.ready_warm`, is warm enough."""
    found = await asyncio.gather(*(check() for check in site.checks))
    if failed := [check for check in found if not check.ok]:
        detail = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise Problem(503, "not-ready", detail, ready=False, checks=[check.model_dump() for check in found])
    return Readiness(ready=True, checks=found)


def add_checks(site: Site) -> None:
    """What a node's readiness needs."""
    node, needed = site.node, site.config.api.ready_warm
    if node is None:
        return

    async def answers() -> Check:
        try:
            status = await node.status()
        except KVStoreError as error:
            return Check(name="node", ok=False, detail=str(error))
        return Check(
            name="node",
            ok=not status.draining,
            detail="is stopping" if status.draining else f"answers at {node.socket}",
        )

    async def is_warm() -> Check:
        warmth = await asyncio.to_thread(read_warmth, site.config.node.directory)
        if warmth is None:
            return Check(name="warmth", ok=False, detail="was never warmed; start a warm-up with kvstore warm")
        detail = f"{warmth.share:.0%} of the warm-up is here, {needed:.0%} needed; the warm-up is {warmth.state}"
        return Check(name="warmth", ok=warmth.enough(needed), detail=detail)

    site.checks.append(answers)
    if needed:
        site.checks.append(is_warm)
