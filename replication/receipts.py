"""What became of a purge: which nodes and regions have carried its tombstone out, and what is left of what it buried.

Every node leaves a receipt in its region's bucket (``kvstore.burials``). A region is looked at in its own bucket, so what is
said of it is not hearsay: the tombstone is there or it is not, and the blocks from before it are counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass

from kvstore.catalog.presence import FOLDER, present
from kvstore.errors import BlockTooLarge, CatalogUnavailable, IdentityError, KVStoreError
from kvstore.parsing import parse_json
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import BLOCKS, HOTNESS, RECEIPTS, tombstone_name
from kvstore.tiers.object.objects import Found
from kvstore.tombstones import Tombstone
from replication.hotset import label_of, read_namespaces
from replication.links import Links
from replication.site import Site

MAX_BYTES = 8 << 10
MOST_RECEIPTS = 10_000
READS_AT_ONCE = 64
REPORTED_SECONDS = 180.0
"""Who left a report in the bucket so lately is taken to live: nodes leave one each minute (``kvstore.catalog.hotness``)."""
PATIENCE_SECONDS = 5.0
"""How long a region's bucket is waited for: another region may be away."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A node has swept its memory and its disk."""

    node: str
    time: float
    """Seconds since the epoch."""
    blocks: int
    """That went with this sweep: of all tombstones that were new to the node."""


@dataclass(frozen=True, slots=True)
class RegionProof:
    """What a region's bucket shows."""

    known: bool = False
    """The tombstone is there."""
    left: int | None = None
    """Blocks from before the purge that are still there; None when that could not be seen."""
    receipts: tuple[Receipt, ...] = ()
    waiting: tuple[str, ...] = ()
    """Nodes that live and have left no receipt yet: by the catalog in the region that asks, elsewhere by what nodes report."""
    problem: str = ""

    @property
    def done(self) -> bool:
        return self.known and self.left == 0 and not self.waiting and not self.problem


@dataclass(frozen=True, slots=True)
class Proof:
    """By region, this one first."""

    stone: Tombstone
    regions: dict[str, RegionProof]

    @property
    def done(self) -> bool:
        """Everywhere."""
        return all(region.done for region in self.regions.values())


async def prove(site: Site, identity: str) -> Proof | None:
    """Look at every region that this one knows; None when this region has no such tombstone. Raises TierUnavailable."""
    async with Links.open(site.links) as bucket:
        stone = await _read_stone(bucket, identity)
        if stone is None:
            return None
        here = await _look(bucket, stone, await _nodes(site))
    others = [] if site.topology is None else [name for name in site.topology.regions if name != site.region]
    found = await asyncio.gather(*(_elsewhere(_links(site, name), stone) for name in others))
    return Proof(stone, {site.region: here, **dict(zip(others, found, strict=True))})


def _links(site: Site, region: str) -> Sequence[ObjectSettings]:
    assert site.topology is not None
    return site.topology.links(region)


async def _elsewhere(links: Sequence[ObjectSettings], stone: Tombstone) -> RegionProof:
    try:
        async with Links.open(links, PATIENCE_SECONDS) as bucket:
            return await _look(bucket, stone)
    except KVStoreError as error:  # away, or nobody here may read it
        return RegionProof(problem=str(error))


async def _look(bucket: Links, stone: Tombstone, nodes: Set[str] | None = None) -> RegionProof:
    """``nodes``: those that live, where that is known better than from the bucket. Raises TierUnavailable."""
    known = await bucket.head(tombstone_name(stone.identity)) is not None
    namespaces = await read_namespaces(bucket)
    buried = [digest for digest, space in namespaces.items() if stone.covers(digest, label_of(space))]
    left = None if stone.prefix else 0  # which blocks continue a chain, no listing tells
    for digest in buried:
        if left is not None:
            left += sum(one.modified <= stone.time for one in await bucket.listing(f"{BLOCKS}/{digest.hex()}"))
    listed = (await bucket.listing(f"{RECEIPTS}/{stone.identity}"))[:MOST_RECEIPTS]
    receipts: list[Receipt] = []
    for start in range(0, len(listed), READS_AT_ONCE):
        batch = await asyncio.gather(*(_read_receipt(bucket, one) for one in listed[start : start + READS_AT_ONCE]))
        receipts += [receipt for receipt in batch if receipt is not None]
    if nodes is None:
        since = time.time() - REPORTED_SECONDS
        nodes = {_node_of(one.name) for one in await bucket.listing(HOTNESS) if one.modified > since}
    waiting = nodes - {receipt.node for receipt in receipts}
    return RegionProof(known, left, tuple(sorted(receipts, key=lambda receipt: receipt.time)), tuple(sorted(waiting)))


async def _nodes(site: Site) -> Set[str] | None:
    """Those that live, by the catalog; None without one that answers."""
    try:
        async with site.open_catalog() as catalog:
            if catalog is None:
                return None
            return {node.name for node in present((await catalog.documents.read_all(FOLDER)).values())}
    except CatalogUnavailable:
        return None


def _node_of(report: str) -> str:
    """The node that left a report of this name in the bucket."""
    return report.rpartition("/")[2].removesuffix(".msgpack")


async def _read_stone(bucket: Links, identity: str) -> Tombstone | None:
    try:
        body = await bucket.read(tombstone_name(identity), MAX_BYTES)
        return None if body is None else Tombstone.from_json(body)
    except (IdentityError, BlockTooLarge):
        return None


async def _read_receipt(bucket: Links, found: Found) -> Receipt | None:
    """None for what is none."""
    try:
        fields = parse_json(await bucket.read(found.name, MAX_BYTES) or b"null")
        return Receipt(str(fields["node"]), float(fields["time"]), int(fields["blocks"]))
    except (ValueError, TypeError, KeyError, BlockTooLarge):
        return None
