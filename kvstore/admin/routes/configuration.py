"""Settings, and where they come from."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from kvstore.admin.auth import Role, reads
from kvstore.admin.models.status import SettingInfo
from kvstore.admin.site import CurrentSite

router = APIRouter(prefix="/v1", tags=["configuration"])


@router.get("/config", dependencies=reads(Role.OPERATOR))
async def config(site: CurrentSite) -> list[SettingInfo]:
    """The effective configuration, secrets masked. What was changed at run time is not in it: see `/v1/policy`."""
    return [SettingInfo.model_validate(asdict(setting)) for setting in site.loaded.settings()]
