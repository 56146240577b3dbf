"""What is kept."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from kvstore.admin.models.base import Model, TierName, Wanted
from kvstore.admin.models.prompts import Found


class Mode(StrEnum):
    """What admission does."""

    OFF = "off"
    OBSERVE = "observe"
    """Counts what it would refuse, and refuses nothing."""
    ENFORCE = "enforce"


class Decisions(Model):
    """What the rule said of blocks offered to a tier, since the node's start."""

    tier: str
    reason: str = Field(examples=["seen_once"])
    blocks: int
    admits: bool


class Policy(Model):
    """What is kept."""

    mode: Mode = Field(description="Of admission.")
    eviction: str = Field(description="Which blocks a full tier gives up first.", examples=["reuse"])
    thresholds: dict[str, float]
    decisions: list[Decisions] = Field(description="Counted in observe and enforce.")


class PolicyChange(Wanted):
    """A new mode of admission. It holds until the node stops; the configuration says how it starts."""

    mode: Mode = Field(examples=["observe"])


class Run(Model):
    """Blocks in a row of which the rule says the same."""

    blocks: int
    reason: str = Field(examples=["seen_once"])
    admits: bool


class DryRun(Found):
    """What enforcing would do with a prompt's blocks, offered now."""

    tiers: dict[TierName, list[Run]]
