"""A node with several tenants as one node: what operators see when they name no tenant. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.tiers.base import Medium

Status = Mapping[str, Any]
"""As the verb ``status`` answers."""

_SUMMED = ("blocks", "used_bytes", "capacity_bytes", "quarantined", "evicted", "refused")


def together(own: Status, tenants: Sequence[Status]) -> dict[str, Any]:
    """The node's own status, with the clients, memory, queues and counters of its tenants in it.

    Disk and bucket are whole already, as the node sees them. What is counted ends in ``_total``; all else is the node's own.
    """
    counters = dict(own["counters"])
    queued = dict(own["queued_bytes"])
    for status in tenants:
        for name, value in status["counters"].items():
            if name.partition("{")[0].endswith("_total"):
                counters[name] = counters.get(name, 0.0) + value
        for medium, nbytes in status["queued_bytes"].items():
            queued[medium] = queued.get(medium, 0) + nbytes
    bad = [block for status in (own, *tenants) for block in status["bad_blocks"]]
    return {
        **own,
        "tiers": [_tier(tier, tenants) if tier["medium"] == Medium.HOST.value else tier for tier in own["tiers"]],
        "clients": [client for status in (own, *tenants) for client in status["clients"]],
        "counters": counters,
        "queued_bytes": queued,
        "bad_blocks": sorted(bad, key=lambda block: -float(block["at"])),
    }


def _tier(own: Mapping[str, Any], tenants: Sequence[Status]) -> dict[str, Any]:
    others = [tier for status in tenants for tier in status["tiers"] if tier["medium"] == own["medium"]]
    return {**own, **{field: sum(tier[field] for tier in (own, *others)) for field in _SUMMED}}
