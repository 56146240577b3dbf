"""Asks the nodes of a region to report now what is hot there (``kvstore.catalog.hotness``), for somebody who wants to know it.

By themselves they report every 15 seconds. The asker leaves a document; each node that sees it reports and then says so in one of
its own. A node that says nothing in time is named: what it reported last counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvstore.catalog.documents import BEGINNING, Documents
from kvstore.catalog.presence import FOLDER as NODES
from kvstore.catalog.presence import present

QUESTIONS, ANSWERS = "asked", "answered"
WAIT_SECONDS = 6.0
"""Nodes look every two seconds, and a large index takes a moment to rank."""
LASTS_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Heard:
    """Nodes that live, by name."""

    reported: tuple[str, ...]
    silent: tuple[str, ...]


async def ask_nodes(documents: Documents, seconds: float = WAIT_SECONDS) -> Heard:
    """Have every node report, and wait until all have, at most ``seconds``. Raises CatalogUnavailable."""
    nodes = {one.name for one in present((await documents.read_all(NODES)).values())}
    question = await documents.put(f"{QUESTIONS}/report", b"", LASTS_SECONDS)
    assert question is not None
    reported: set[str] = set()
    mark, until = BEGINNING, time.monotonic() + seconds
    while True:
        page = await documents.read(ANSWERS, mark)
        mark = page.mark
        reported |= nodes & {document.rest for document in page.documents if document.revision > question}
        if page.caught_up and (reported == nodes or time.monotonic() >= until):
            return Heard(tuple(sorted(reported)), tuple(sorted(nodes - reported)))
        if page.caught_up:
            await asyncio.sleep(POLL_SECONDS)


class Answering:
    """A node's part. In its event loop."""

    def __init__(self, documents: Documents, node: str, report: Callable[[], Awaitable[None]]) -> None:
        """``node`` is its name in the region; ``report`` may raise KVStoreError."""
        self._documents = documents
        self._node = node
        self._report = report
        self._mark = BEGINNING

    async def round(self) -> None:
        """Report if somebody asked since the last round. Raises CatalogUnavailable, and what ``report`` does."""
        page = await self._documents.read(QUESTIONS, self._mark)
        if page.documents:
            await self._report()
            await self._documents.put(f"{ANSWERS}/{self._node}", b"", LASTS_SECONDS)
        self._mark = page.mark
