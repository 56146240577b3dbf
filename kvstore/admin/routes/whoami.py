"""Who asks, and what is asked."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

import kvstore
from kvstore.admin.auth import Principal, Role, authorize
from kvstore.admin.models.status import WhoAmI
from kvstore.admin.site import CurrentSite

router = APIRouter(prefix="/v1", tags=["status"])


@router.get("/whoami")
async def whoami(site: CurrentSite, who: Annotated[Principal, authorize(Role.VIEWER, tenants=True)]) -> WhoAmI:
    """Whose token this is and what it may do, and where one has come to."""
    config = site.config
    return WhoAmI(
        name=who.name,
        role=who.role.value,
        tenant=who.tenant,
        token=config.api.asks_who,
        site=site.name,
        region=config.region.name,
        version=kvstore.__version__,
    )
