"""Keeps a tenant's part of a region's bucket under its quota.

What goes is the tenant's own, by the same scores as in the evictor. Nodes know nothing of it: between two rounds a tenant may
exceed its quota by what they write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from kvstore.catalog.base import Entry
from kvstore.identity import BlockKey
from replication.contents import Contents
from replication.evictor import BEGIN_SHARE, END_SHARE, known_scores, overflow, victims
from replication.hotset import read_namespaces
from replication.links import Links
from replication.manifest import HotBlock

Owners = Mapping[bytes, str]
"""The tenant of each namespace. Blocks of others are nobody's, and count for nobody."""


async def keep_quotas(contents: Contents, quotas: Mapping[str, int], enforce: bool) -> int:
    """Evict of each tenant that is nearly at its quota (bytes); how many blocks went, or would.

    Needs a catalog that covers the bucket, as the evictor does. Raises TierUnavailable, CatalogUnavailable.
    """
    if await contents.used_bytes() is None:
        return 0
    owners = await read_owners(contents.bucket)
    scores, pinned = await known_scores(contents), await contents.pinned()
    blocks = (await contents.blocks()).values()
    going = await asyncio.to_thread(beyond, blocks, owners, scores, quotas, pinned)
    return await contents.delete(going) if enforce else len(going)


async def read_owners(bucket: Links) -> dict[bytes, str]:
    """As the bucket says. Raises TierUnavailable."""
    return {digest: namespace.tenant for digest, namespace in (await read_namespaces(bucket)).items()}


def beyond(
    blocks: Collection[Entry],
    owners: Owners,
    scores: Mapping[BlockKey, float],
    quotas: Mapping[str, int],
    pinned: AbstractSet[BlockKey] = frozenset(),
) -> list[Entry]:
    """What has to go, tails before heads; pure. The same part of a quota is kept free as of a cap."""
    going: list[Entry] = []
    for tenant, quota in quotas.items():
        own = [entry for entry in blocks if owners.get(entry.namespace) == tenant]
        used = sum(entry.envelope_bytes for entry in own)
        if used > quota * (1 - BEGIN_SHARE):
            going += victims(own, scores, used - int(quota * (1 - END_SHARE)), pinned)
    return going


def overflow_of_tenants(
    blocks: Collection[Entry],
    owners: Owners,
    scores: Mapping[BlockKey, float],
    coming: Sequence[HotBlock],
    quotas: Mapping[str, int],
    pinned: AbstractSet[BlockKey] = frozenset(),
) -> set[BlockKey]:
    """Those of the blocks to come (parents first) that a quota would give up as soon as they are there; pure."""
    lost: set[BlockKey] = set()
    for tenant, quota in quotas.items():
        own = [entry for entry in blocks if owners.get(entry.namespace) == tenant]
        theirs = [block for block in coming if owners.get(block.namespace) == tenant]
        lost |= overflow(own, scores, theirs, quota, pinned)
    return lost
