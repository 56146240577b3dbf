"""Others who write to the same bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.envelope import Header
from kvstore.identity import BlockKey

if TYPE_CHECKING:
    from kvstore.tiers.object.tier import ObjectTier


class Peers:
    """What a tier tells others, and asks of them. This one stands for nobody: a subclass knows how to reach them.

    All methods are called in the tier's event loop, and none raises because the others cannot be reached.
    """

    keep_room = False
    """Whether they, and not each tier by itself, keep the bucket under its capacity; a tier that sees it full refuses then."""

    def join(self, tier: ObjectTier) -> None:
        """Called once, before anything else."""

    async def stock(self) -> bool:
        """Fill the tier's index with what they know. False when that may not be the whole bucket: it is listed then."""
        return False

    def stored(self, header: Header) -> None:
        """A block is durable in the bucket, or was found there. ``header.tokens`` is 0 if only its size is known."""

    def lost(self, key: BlockKey) -> None:
        """A block that was listed is not in the bucket, or is bad."""

    async def deleting(self, keys: Sequence[BlockKey]) -> None:
        """Blocks will be deleted on return."""

    async def close(self) -> None:
        """The tier closes. Calling it again does no harm."""
