"""What is kept."""

from __future__ import annotations

from fastapi import APIRouter

from kvstore.admin.auth import Role, reads, writes
from kvstore.admin.models.policy import DryRun, Policy, PolicyChange, Run
from kvstore.admin.models.prompts import Prompt
from kvstore.admin.problems import documented
from kvstore.admin.site import CurrentNode

router = APIRouter(prefix="/v1", tags=["policy"], responses=documented(422, 503, 504))


@router.get("/policy", dependencies=reads())
async def show_policy(node: CurrentNode) -> Policy:
    """Admission and eviction as they are now, and what the rule of admission said since the node's start."""
    return Policy.model_validate(await node.read("policy"))


@router.patch("/policy", dependencies=writes(Role.OPERATOR))
async def change_policy(change: PolicyChange, node: CurrentNode) -> Policy:
    """Switch admission between off, observe and enforce, until the node stops."""
    return Policy.model_validate(await node.change("policy", mode=change.mode.value))


@router.post("/policy/dry-run", dependencies=reads(), responses=documented(404, 409))
async def dry_run(prompt: Prompt, node: CurrentNode) -> DryRun:
    """What admission would say of a prompt's blocks if they were offered to the slower tiers now. Changes nothing."""
    found = await node.read("judge", **await node.about(prompt))
    tiers = {
        medium: [Run(blocks=blocks, reason=reason, admits=admits) for blocks, reason, admits in runs]
        for medium, runs in found["tiers"].items()
    }
    return DryRun.model_validate({**found, "tiers": tiers})
