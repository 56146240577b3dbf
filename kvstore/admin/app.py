"""Puts the app together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

import kvstore
from kvstore.admin import kinds, problems
from kvstore.admin.audit import Audit
from kvstore.admin.guard import Guard
from kvstore.admin.idempotency import Idempotency
from kvstore.admin.routes import NODE_ROUTERS, ROUTERS, dashboard, events, health
from kvstore.admin.site import Site
from kvstore.audit import FILE

EXTENSIONS = "kvstore.admin"

THREADS = 32
"""Each call to the node waits in a thread, and a long one must not keep a probe waiting."""

_TAGS = {
    "health": "Probes.",
    "status": "The node as it is now.",
    "blocks": "What tiers hold, and doing something about it.",
    "prompts": "What a prompt would find here, and which prompts are hot.",
    "namespaces": "Models and everything else that shapes a block's bytes.",
    "policy": "What is kept.",
    "tenants": "Who shares the node.",
    "jobs": "Long work.",
    "replication": "Other regions.",
    "configuration": "Settings and where they come from.",
    "observability": "Metrics and live events.",
}


def create_app(site: Site, hosts: AbstractSet[str] | None = None) -> FastAPI:
    """The API of ``site``. ``hosts``: names that requests may ask for it by; None: any."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="api"))
        site.all_jobs.start()
        yield
        await site.all_jobs.close()
        for opened in (site.node, site.catalog, site.peers):
            if opened is not None:
                await opened.close()

    app = FastAPI(
        title="kvstore admin API",
        version=kvstore.__version__,
        summary="Look into a KV cache and steer it.",
        lifespan=lifespan,
        openapi_tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
        generate_unique_id_function=_operation,
        redoc_url=None,
        docs_url=None,  # its page loads scripts from elsewhere
    )
    app.state.site = site
    problems.install(app)
    kinds.register(site.jobs, site.node, site.config)
    health.add_checks(site)
    events.add_parts(site)
    app.include_router(health.router)
    app.include_router(dashboard.router)
    app.mount("/dashboard", dashboard.files())
    for router in (*ROUTERS, *(NODE_ROUTERS if site.node is not None else ()), *extensions(site)):
        app.include_router(router, responses=problems.documented(400, 401, 403, 413, 422))
    app.add_middleware(Idempotency)
    app.add_middleware(Audit, path=site.config.node.directory / FILE)
    app.add_middleware(Guard, hosts=hosts)
    return app


def extensions(site: Site) -> list[APIRouter]:
    """What other packages add, by name."""
    found: list[Any] = [
        entry.load()(site) for entry in sorted(entry_points(group=EXTENSIONS), key=lambda entry: entry.name)
    ]
    return [router for router in found if router is not None]


def _operation(route: APIRoute) -> str:
    """Names of operations in the document: those of the functions."""
    return route.name
