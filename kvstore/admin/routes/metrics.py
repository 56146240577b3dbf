"""For Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from kvstore.admin.auth import reads
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite

router = APIRouter(dependencies=reads(), responses=documented(404, 503, 504))


@router.get("/metrics", tags=["observability"], response_class=Response)
async def metrics(site: CurrentSite, request: Request) -> Response:
    """The node's metrics in Prometheus' text format; those of the service where there is no node."""
    wanted = "application/openmetrics-text" in request.headers.get("accept", "")
    kind = openmetrics.CONTENT_TYPE_LATEST if wanted else CONTENT_TYPE_LATEST
    if site.node is not None:
        return Response(await (site.node.openmetrics() if wanted else site.node.metrics()), media_type=kind)
    if site.registry is None:
        raise Problem(404, "no-metrics", "this service has no metrics")
    told = openmetrics.generate_latest if wanted else generate_latest
    return Response(await asyncio.to_thread(told, site.registry), media_type=kind)
