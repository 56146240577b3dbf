"""What a round of replication came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from replication.copier import Copied, Outcome
from replication.manifest import HotBlock
from replication.planner import GB, Plan

Progress = Callable[["FlowReport", HotBlock, Outcome], None]


@dataclass
class FlowReport:
    """What one flow would bring, and what it brought."""

    source: str
    flow: str
    price_per_gb: float
    plan: Plan = field(default_factory=lambda: Plan(()))
    copied: Copied = field(default_factory=Copied)
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """Of the plan."""
        return self.plan.nbytes / GB * self.price_per_gb


@dataclass
class Cycle:
    """What came to an end in one round: of all sources, unless some are still under way."""

    flows: list[FlowReport] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """By source: why its manifest was refused, or its copy broke off."""
    lag: dict[str, float | None] = field(default_factory=dict)
    """By source, in seconds."""
    buried: int = 0
    """Blocks deleted because of tombstones."""
    away_since: dict[str, float] = field(default_factory=dict)
    """By source, in seconds since the epoch; 0: it answers."""

    def add(self, other: Cycle) -> None:
        self.flows += other.flows
        self.problems |= other.problems
        self.lag |= other.lag
        self.buried += other.buried
        self.away_since |= other.away_since
