"""The routes, one module a subject."""

from __future__ import annotations

from kvstore.admin.routes import (
    blocks,
    configuration,
    events,
    insight,
    jobs,
    metrics,
    namespaces,
    policy,
    prompts,
    region,
    status,
    tenants,
    whoami,
)

ROUTERS = (metrics.router, events.router, jobs.router, configuration.router, region.router, whoami.router)
"""Those of every service, beside those of health."""
NODE_ROUTERS = (
    status.router,
    blocks.router,
    prompts.router,
    insight.router,
    namespaces.router,
    policy.router,
    tenants.router,
)
"""Those that ask a node."""
