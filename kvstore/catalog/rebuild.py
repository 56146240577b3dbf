"""Fills a catalog from the bucket, which is the truth."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kvstore.catalog.base import BATCH, Catalog, Entry
from kvstore.errors import CatalogUnavailable
from kvstore.tiers.object.contents import plausible_size, size_only
from kvstore.tiers.object.names import BLOCKS, parse_block_name
from kvstore.tiers.object.objects import Found, Objects

ROLE = "role/rebuild"
ROLE_SECONDS = 30.0
"""How long a rebuilder may take for one page before another may begin."""


async def fill(
    catalog: Catalog, objects: Objects, epoch: str, progress: Callable[[int], Awaitable[None]] | None = None
) -> int | None:
    """Record every block of a listing, then call ``epoch`` complete; how many blocks, or None when the epoch was over.

    A listing tells sizes, not chains: those are added by whoever reads a block's header. A block that is deleted while the
    listing is under way may be recorded all the same; who then asks the bucket for it finds that out, and removes it.
    ``progress`` is told the number of blocks after each page. Raises CatalogUnavailable and TierUnavailable.
    """
    blocks = 0
    async for page in objects.walk(BLOCKS):
        entries = [entry for found in page if (entry := _entry(found)) is not None]
        for start in range(0, len(entries), BATCH):
            await catalog.record({entry.key: entry for entry in entries[start : start + BATCH]})
        blocks += len(entries)
        if progress is not None:
            await progress(blocks)
    return blocks if await catalog.complete(epoch) else None


def _entry(found: Found) -> Entry | None:
    parsed = parse_block_name(found.name)
    return Entry.of(size_only(*parsed, found)) if parsed is not None and plausible_size(found.size) else None


async def rebuild(catalog: Catalog, objects: Objects, holder: str, progress: Callable[[int], None]) -> int:
    """Drop the index and fill it again; how many blocks. Nodes go on with what they know meanwhile.

    ``holder`` names the caller. Raises CatalogUnavailable, also when a node is at it already, and TierUnavailable.
    """

    async def take_turn(blocks: int) -> None:
        if await catalog.claim(ROLE, holder, ROLE_SECONDS) is None:
            raise CatalogUnavailable(
                "another process is filling the catalog from the bucket; see kvstore catalog status"
            )
        progress(blocks)

    await take_turn(0)
    blocks = await fill(catalog, objects, await catalog.reset(), take_turn)
    await catalog.claim(ROLE, holder, 0)
    if blocks is None:
        raise CatalogUnavailable("the catalog was dropped while it was filled; try again")
    return blocks
