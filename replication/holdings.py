"""What other regions hold of a chain, by the manifests of theirs that lie in this region's bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.admin.cached import Cached
from kvstore.identity import BlockKey
from kvstore.tiers.object import ObjectSettings
from replication.hotset import kept_manifests
from replication.links import Links

KEPT_SECONDS = 60.0
"""A manifest is some megabytes, and as old as the last round of replication anyway."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one region has published of a chain."""

    region: str
    published: float
    """Seconds since the epoch."""
    held: npt.NDArray[np.bool_]
    """One flag a block."""


class Holdings:
    """In one event loop. Raises TierUnavailable."""

    def __init__(self, links: Sequence[ObjectSettings]) -> None:
        """``links``: ways to this region's bucket."""
        self._links = links
        self._manifests = Cached(self._read, KEPT_SECONDS)

    async def of(self, chain: Sequence[BlockKey]) -> list[Holding]:
        """By region: this one, and those that it pulls from."""
        wanted = _heads(chain)
        return [
            Holding(region, published, np.isin(wanted, heads)) for region, published, heads in await self._manifests()
        ]

    async def _read(self) -> list[tuple[str, float, npt.NDArray[np.uint64]]]:
        async with Links.open(self._links) as bucket:
            found = await kept_manifests(bucket)
        return [(one.region, one.published, _heads([block.key for block in one.blocks])) for one in found]


def _heads(keys: Sequence[BlockKey]) -> npt.NDArray[np.uint64]:
    """Half of each key: enough to tell a million apart, in an eighth of the memory of a set."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)[:, 0]
