"""What the server really does. S3-compatible servers ignore some requests in silence, so they are tried, not believed."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from kvstore.errors import TierUnavailable
from kvstore.tiers.object.bucket import Bucket
from kvstore.tiers.object.names import SCRATCH
from kvstore.tiers.object.objects import Objects


@dataclass(frozen=True, slots=True)
class ServerFeatures:
    """Findings of a probe."""

    conditional_put: bool
    """``If-None-Match: *`` is honoured: of two writers of one object, one is told that it exists. Without it the tier asks
    before it writes, and two writers at the same moment both write (the same block)."""
    ranged_get: bool
    """A range is answered with that range. Without it a block's header cannot be read alone."""
    checksums: bool
    """A body that its crc32c header belies is refused. For information: obstore sends no crc32c header, and the block's own
    checksum finds the damage when it is read."""


async def probe(objects: Objects, bucket: Bucket | None) -> ServerFeatures:
    """Try the server with scratch objects, which are deleted again. ``bucket`` is None for a folder.

    Raises TierUnavailable.
    """
    name = f"{SCRATCH}/{os.urandom(8).hex()}"
    await objects.put(name, b"first", create=False)
    try:
        conditional = not await objects.put(name, b"again", create=True)
        try:
            ranged = await objects.start_of(name, 1) in (b"f", b"a")
        except TierUnavailable:
            ranged = False
    finally:
        await objects.delete([name])
    checksums = bucket is not None and await asyncio.to_thread(bucket.verifies_checksums)
    return ServerFeatures(conditional, ranged, checksums)
