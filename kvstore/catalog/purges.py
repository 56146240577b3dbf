"""Rings when something was purged, so that nodes read the bucket's tombstones at once, not at their next round.

The tombstones are the truth: a ring that is lost with the catalog costs the seconds until then (``kvstore.burials``).
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.catalog.documents import BEGINNING, Documents

FOLDER = "purges"
LASTS_SECONDS = 3600.0
"""Longer than any node goes without a round."""


async def ring(documents: Documents) -> None:
    """Tombstones were written. Raises CatalogUnavailable."""
    await documents.put(f"{FOLDER}/latest", b"", LASTS_SECONDS)


class Bell:
    """Wakes whoever carries purges out on a node. In the node's event loop."""

    def __init__(self, documents: Documents, wake: Callable[[], None]) -> None:
        self._documents = documents
        self._wake = wake
        self._mark = BEGINNING

    async def round(self) -> None:
        """Raises CatalogUnavailable."""
        page = await self._documents.read(FOLDER, self._mark)
        self._mark = page.mark
        if page.documents:
            self._wake()
