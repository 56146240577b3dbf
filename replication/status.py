"""What a region's bucket tells of its replication."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from replication import lease
from replication.cursor import Cursor, charges, month_of
from replication.duties import read_standing
from replication.hotset import kept_manifest
from replication.links import Links
from replication.planner import GB
from replication.topology import Topology

ROLES = ("publisher", "replicator", "evictor", "retention")


async def duties(bucket: Links) -> dict[str, Any]:
    """How each duty of the regional service fared last, of those that were ever done. Raises TierUnavailable."""
    standings = {role: await read_standing(bucket, role) for role in ROLES}
    return {role: asdict(standing) for role, standing in standings.items() if standing is not None}


async def look(bucket: Links, topology: Topology, region: str) -> dict[str, Any]:
    """Plain types, for people and for JSON. Raises TierUnavailable."""
    now = time.time()
    own = await kept_manifest(bucket, region)
    leases = {role: await lease.current(bucket, role) for role in ROLES}
    return {
        "region": region,
        "mode": topology.mode,
        "manifest": own
        and {
            "sequence": own.sequence,
            "published": own.published,
            "blocks": len(own.blocks),
            "bytes": sum(block.nbytes for block in own.blocks),
            "tombstones": len(own.tombstones),
        },
        "leases": {
            role: {"holder": grant.holder if grant else "", "held": bool(grant and grant.expires > now)}
            for role, grant in leases.items()
        },
        "sources": {
            source: await _source(bucket, topology, region, source, now)
            for source in dict.fromkeys(flow.source for flow in topology.flows_to(region))
        },
    }


async def _source(bucket: Links, topology: Topology, region: str, source: str, now: float) -> dict[str, Any]:
    cursor = await Cursor.load(bucket, source)
    flows = [flow for flow in topology.flows_to(region) if flow.source == source]
    spent = {
        flow: cursor.spending(flow.identity, now).nbytes
        + sum((await charges(bucket, flow.identity, month_of(now))).values())
        for flow in flows
    }
    return {
        "sequence": cursor.sequence,
        "published": cursor.published,
        "lag_seconds": cursor.lag(now),
        "blocks": cursor.blocks,
        "bytes": cursor.nbytes,
        "month_bytes": sum(spent.values()),
        "month_cost": sum(nbytes / GB * flow.price_per_gb for flow, nbytes in spent.items()),
        "updated": cursor.updated,
        "problem": cursor.problem,
        "away_since": cursor.away_since or None,
    }
