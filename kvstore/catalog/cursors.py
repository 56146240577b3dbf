"""How far a region has come with each source that it copies from: told after every round, for whoever asks.

What a replicator goes on from lies in the bucket (``replication.cursor``): it holds what was spent too, and must outlive the
catalog.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from kvstore.catalog.documents import Document, Documents
from kvstore.parsing import parse_json

FOLDER = "cursors"
LASTS_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCursor:
    """Times are seconds since the epoch."""

    source: str
    sequence: int
    """Of the newest manifest that was believed."""
    published: float
    """When that was published."""
    caught_up: float
    """When the newest manifest was published all of whose plan has been copied; 0: none has."""
    blocks: int
    """Copied so far."""
    nbytes: int
    updated: float
    problem: str
    """Why the last round fell short; empty when it did not."""

    @classmethod
    def unpack(cls, document: Document) -> Self | None:
        """None for what is none."""
        try:
            fields = parse_json(document.body)
            return cls(
                source=str(fields["source"]),
                sequence=int(fields["sequence"]),
                published=float(fields["published"]),
                caught_up=float(fields["caught_up"]),
                blocks=int(fields["blocks"]),
                nbytes=int(fields["nbytes"]),
                updated=float(fields["updated"]),
                problem=str(fields["problem"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError):
            return None

    async def tell(self, documents: Documents) -> None:
        """Raises CatalogUnavailable."""
        await documents.put(f"{FOLDER}/{self.source}", json.dumps(asdict(self)).encode(), LASTS_SECONDS)


async def cursors(documents: Documents) -> list[SourceCursor]:
    """Those of all sources, by name. Raises CatalogUnavailable."""
    found = map(SourceCursor.unpack, (await documents.read_all(FOLDER)).values())
    return sorted((one for one in found if one is not None), key=lambda one: one.source)
