"""The routes, one module a subject."""

from __future__ import annotations

from kvstore.admin.routes import events, health, jobs, status

ROUTERS = (health.router, events.router, jobs.router)
"""Those of every service."""
NODE_ROUTERS = (status.router,)
"""Those that ask a node."""
