"""Purging everywhere, as a job of the admin API."""

from __future__ import annotations

import time
from typing import Any, Self

from pydantic import Field, model_validator

from kvstore.admin.auth import Role
from kvstore.admin.jobs import JobKind, Running
from kvstore.admin.models.base import DIGEST_EXAMPLE, KEY_EXAMPLE, Wanted
from kvstore.tombstones import Tombstone, end_of_second
from replication.publisher import entomb
from replication.site import Site


class PurgeOptions(Wanted):
    """Which blocks; fields together narrow it down."""

    model: str = Field("", max_length=512, description="All blocks of this model.", examples=["Qwen/Qwen3-8B"])
    tenant: str = Field("", max_length=512, description="All blocks of this tenant.", examples=["default"])
    namespace: str = Field(
        "", pattern="^([0-9a-f]{32})?$", description="All blocks of this namespace.", examples=[DIGEST_EXAMPLE]
    )
    prefix: str = Field(
        "", pattern="^([0-9a-f]{32})?$", description="This block and all that continue it.", examples=[KEY_EXAMPLE]
    )

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.model or self.tenant or self.namespace or self.prefix):
            raise ValueError("name a model, a tenant, a namespace or a prefix")
        return self


def purge_kind(site: Site) -> JobKind:
    async def run(job: Running, options: PurgeOptions) -> dict[str, Any]:
        stone = Tombstone(
            time=job.checkpoint.get("time") or end_of_second(time.time()),
            tenant=options.tenant,
            model=options.model,
            namespace=bytes.fromhex(options.namespace),
            prefix=bytes.fromhex(options.prefix),
        )
        # Resumed, it buries what was there at first, and nothing that engines computed since.
        job.report(0, unit="blocks", note="deleting from the bucket", checkpoint={"time": stone.time})
        async with site.open_contents() as contents:
            deleted = await entomb(contents, [stone])
        job.report(deleted, deleted, "blocks")
        return {"tombstone": stone.identity, "deleted": deleted}

    summary = "Delete a model's, a namespace's or a prompt's blocks from the bucket for good, on every node and in every region."
    return JobKind("purge", summary, PurgeOptions, run, Role.ADMIN)
