"""Pins of a region: a chain that is pinned on one node is pinned on all, and for whoever evicts from the bucket.

A wish is a document, named by its tenant and its chain's last block. Each node writes down what it was asked, heeds what others
wrote for the same tenant, and keeps all of it in its own file too (``kvstore.demand``): a catalog that was lost is told again by
whichever node is first, and while it is away every node goes on with what it knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

import structlog

from kvstore.catalog.documents import BEGINNING, Document, Documents
from kvstore.identity import BlockKey
from kvstore.policy.pins import Pins, Wish

log = structlog.get_logger(__name__)

FOLDER = "pins"


class RegionPins:
    """Keeps a node's pins in line with those of its region. In the node's event loop."""

    def __init__(
        self,
        documents: Documents,
        pins: Pins,
        tenant: str,
        pinned: Callable[[Sequence[BlockKey]], object] = lambda keys: None,
    ) -> None:
        """``pinned`` is told of blocks that others want kept, so that no tier gives them up on an earlier ranking."""
        self._documents = documents
        self._own = f"{FOLDER}/{blake2b(tenant.encode(), digest_size=8).hexdigest()}/"
        self._pins = pins
        self._pinned = pinned
        self._mark = BEGINNING
        self._written: dict[str, tuple[float, int]] = {}
        """What the catalog has, by name: when the wish was made, and the document's revision."""

    async def round(self) -> None:
        """Hear what is new, then tell what is. Raises CatalogUnavailable; the next round goes on from there."""
        caught_up = False
        while not caught_up:
            page = await self._documents.read(FOLDER, self._mark)
            if page.restarted:
                self._written.clear()
            self._hear(page.documents)
            self._mark, caught_up = page.mark, page.caught_up
        await self._tell()

    def _hear(self, documents: Sequence[Document]) -> None:
        now = time.time()
        for document in documents:
            if not document.name.startswith(self._own):
                continue
            wish = read_wish(document)
            self._written[document.name] = wish.at if wish else 0.0, document.revision
            if wish is not None and self._pins.heed(wish, now) and wish.until:
                self._pinned(wish.blocks)

    async def _tell(self) -> None:
        now = time.time()
        for wish in self._pins.wishes(now):
            name = f"{self._own}{wish.last.hex()}"
            at, revision = self._written.get(name, (0.0, 0))
            if at >= wish.at:
                continue
            written = await self._documents.put(name, wish.pack(), wish.ends - now, expected=revision)
            if written is None:  # somebody was faster, or what was there has expired: look again
                self._mark = BEGINNING
                self._written.clear()
                return
            self._written[name] = wish.at, written


async def region_pins(documents: Documents) -> Pins:
    """What is pinned in the region, of all tenants. Raises CatalogUnavailable."""
    pins, now = Pins(), time.time()
    for document in (await documents.read_all(FOLDER)).values():
        if (wish := read_wish(document)) is not None:
            pins.heed(wish, now)
    return pins


def read_wish(document: Document) -> Wish | None:
    """None for what is none."""
    try:
        wish = Wish.unpack(document.body)
    except ValueError as error:
        log.warning("unreadable pin", name=document.name, error=str(error))
        return None
    return wish if document.rest.rpartition("/")[2] == wish.last.hex() else None
