"""What ``kvstore top`` shows, from the snapshots that the admin API tells each second. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.admin.models.status import Snapshot

LATELY_SECONDS = 10.0
"""What rates are taken over: long enough to be calm, short enough to be now."""


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier; rates in bytes per second, None before there are two snapshots of one node."""

    name: str
    blocks: int
    used_bytes: int
    capacity_bytes: int | None
    queued_bytes: int
    quarantined: int
    breaker: str
    """closed, open or half_open."""
    read: float | None
    written: float | None
    hit_ratio: float | None
    """Of the tokens asked for since the node's start, those found here."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A node or region as of one moment."""

    time: float
    uptime_seconds: float | None = None
    """None on a region's service, which has no node."""
    draining: bool = False
    hit_ratio: float | None = None
    """Of the tokens asked for lately, those found in any tier; None when nobody asked."""
    hit_ratio_ever: float | None = None
    requests_per_second: float | None = None
    prefill_seconds_saved: float = 0.0
    prefill_saved_per_second: float | None = None
    clients: int = 0
    tiers: list[Tier] = field(default_factory=list)
    hot: list[dict[str, Any]] = field(default_factory=list)
    """As ``/v1/hot``, with the model's name."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    replication: dict[str, Any] | None = None
    """As ``/v1/replication``."""
    warmth: dict[str, Any] | None = None
    nodes: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Parts that could not be had, and why."""


class Observer:
    """Turns snapshots into figures: rates are differences to the ones before."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, str, dict[str, float]]] = deque()
        """Time, the node's epoch, its counters."""

    def look(self, snapshot: Snapshot) -> Figures:
        """Snapshots come in the order of their times."""
        parts = snapshot.parts
        node: dict[str, Any] = parts.get("node") or {}
        common: dict[str, Any] = {
            "time": snapshot.time,
            "jobs": parts.get("jobs") or [],
            "replication": parts.get("replication"),
            "warmth": parts.get("warmth"),
            "nodes": parts.get("nodes") or [],
            "problems": snapshot.problems,
        }
        if not node:
            return Figures(**common)
        counters: dict[str, float] = node["counters"]
        self._remember(snapshot.time, node["epoch"], counters)
        models = {space["digest"]: space["fields"].get("model", "") for space in node["namespaces"]}
        asked = counters.get("kvstore_asked_tokens_total", 0.0)
        asked_lately, found_lately = (
            self._grown("kvstore_asked_tokens_total"),
            self._grown("kvstore_found_tokens_total"),
        )
        return Figures(
            **common,
            uptime_seconds=node["uptime_seconds"],
            draining=node["draining"],
            hit_ratio=found_lately / asked_lately if asked_lately and found_lately is not None else None,
            hit_ratio_ever=_sum(counters, "kvstore_found_tokens_total") / asked if asked else None,
            requests_per_second=self._rate("kvstore_requests_total"),
            prefill_seconds_saved=counters.get("kvstore_spared_prefill_seconds_total", 0.0),
            prefill_saved_per_second=self._rate("kvstore_spared_prefill_seconds_total"),
            clients=len(node["clients"]),
            tiers=[self._tier(tier, counters, asked) for tier in node["tiers"]],
            hot=[{**prompt, "model": models.get(prompt["namespace"], "")} for prompt in parts.get("hot") or []],
        )

    def _tier(self, tier: dict[str, Any], counters: dict[str, float], asked: float) -> Tier:
        name = tier["medium"]
        states = ("open", "half_open")
        breaker = next((s for s in states if counters.get(f"kvstore_breaker_state{{state={s},tier={name}}}")), "closed")
        found = counters.get(f"kvstore_found_tokens_total{{tier={name}}}", 0.0)
        return Tier(
            name,
            tier["blocks"],
            tier["used_bytes"],
            tier["capacity_bytes"],
            tier["queued_bytes"],
            tier["quarantined"],
            breaker,
            self._rate(f"kvstore_tier_bytes_total{{operation=get,tier={name}}}"),
            self._rate(f"kvstore_tier_bytes_total{{operation=put,tier={name}}}"),
            found / asked if asked else None,
        )

    def _remember(self, time: float, epoch: str, counters: dict[str, float]) -> None:
        """A node that restarted counts from zero: what was seen of it before is no base for a difference."""
        if self._seen and self._seen[-1][1] != epoch:
            self._seen.clear()
        self._seen.append((time, epoch, counters))
        while self._seen[0][0] < time - LATELY_SECONDS:
            self._seen.popleft()

    def _grown(self, name: str) -> float | None:
        """By how much the series of that name, or all of a family, grew within what is remembered."""
        (_, _, first), (_, _, last) = self._seen[0], self._seen[-1]
        return _sum(last, name) - _sum(first, name) if len(self._seen) > 1 else None

    def _rate(self, name: str) -> float | None:
        over = self._seen[-1][0] - self._seen[0][0]
        grown = self._grown(name)
        return None if grown is None or over <= 0 else grown / over


def _sum(counters: dict[str, float], name: str) -> float:
    return sum(value for sample, value in counters.items() if sample == name or sample.startswith(f"{name}{{"))
