"""``/v1/purges``: what became of a purge, for the admin API."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from kvstore.admin.auth import reads
from kvstore.admin.models.base import DIGEST_EXAMPLE
from kvstore.admin.models.replication import NodeReceipt, PurgeProof, RegionReceipts
from kvstore.admin.problems import Problem, documented
from replication.receipts import Proof, prove
from replication.site import Site


def proof_router(site: Site) -> APIRouter:
    router = APIRouter(prefix="/v1/purges", tags=["replication"], responses=documented(404, 503))

    @router.get("/{tombstone}", dependencies=reads())
    async def show_purge(
        tombstone: Annotated[
            str,
            Path(pattern="^[0-9a-f]{32}$", description="As the job of the purge gave it.", examples=[DIGEST_EXAMPLE]),
        ],
    ) -> PurgeProof:
        """Which nodes and regions have carried a purge out, and what is left of what it buried: by every region's own bucket."""
        found = await prove(site, tombstone)
        if found is None:
            raise Problem(404, "no-such-purge", f"this region has no tombstone {tombstone}", "See the job's result.")
        return document(found)

    return router


def document(proof: Proof) -> PurgeProof:
    """For people and programs."""
    stone = proof.stone
    return PurgeProof(
        tombstone=stone.identity,
        time=stone.time,
        tenant=stone.tenant,
        model=stone.model,
        namespace=stone.namespace.hex(),
        prefix=stone.prefix.hex(),
        done=proof.done,
        regions={
            name: RegionReceipts(
                done=region.done,
                known=region.known,
                left=region.left,
                receipts=[NodeReceipt(node=r.node, time=r.time, blocks=r.blocks) for r in region.receipts],
                waiting=list(region.waiting),
                problem=region.problem,
            )
            for name, region in proof.regions.items()
        },
    )
