"""What the processes of a region tell each other beside the index: small named documents that expire.

A document says what is true for a while: that a node lives, that a prompt is pinned, how far a job is. Nothing here is the only
copy of what must last: whoever wrote a document writes it again when the catalog was lost.

* A name is ``folder/rest``; a folder holds at most ``MOST_DOCUMENTS``, and beyond it those that end soonest go first.
* Each write has a ``revision`` that is larger than all before it in the catalog. So a write can depend on what was read
  (``expected``), and a reader asks for what came ``since`` its last question.
* A document that is removed, or has expired, is simply not there: readers that must hear of an end are told by a document.

All methods are called in one event loop and raise CatalogUnavailable within a few seconds when the catalog does not answer.
Each is one round trip.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

MAX_DOCUMENT_BYTES = 8 << 20
"""A node's report of what is hot has 5 MB at most."""
MOST_DOCUMENTS = 10_000
PAGE, PAGE_BYTES = 64, 4 << 20
"""Documents in one answer, and bytes after which it takes no further one: a large answer keeps others waiting."""

_NAME = re.compile(r"[\w.-]{1,64}/[\w.:/-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    body: bytes
    revision: int
    expires: float
    """Seconds since the epoch, by the catalog's clock."""

    @property
    def rest(self) -> str:
        """The name within its folder."""
        return self.name.partition("/")[2]


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a reader of a folder has come. Made by ``read``; of no meaning to the reader."""

    epoch: str = ""
    revision: int = 0


BEGINNING = Mark()


@dataclass(frozen=True, slots=True)
class Page:
    """What ``read`` brought."""

    documents: tuple[Document, ...]
    """In the order in which they were written."""
    mark: Mark
    """For the next call."""
    restarted: bool
    """The folder is read from its start: the catalog was lost or dropped meanwhile, or this is the first call."""
    caught_up: bool
    """There is nothing more at the moment."""


class Documents(ABC):
    """The documents of one catalog."""

    @abstractmethod
    async def put(self, name: str, body: bytes, seconds: float, expected: int | None = None) -> int | None:
        """Write a document that lasts for ``seconds``; 0 removes it. The revision of the write.

        None, and nothing is written: the document has another revision than ``expected`` (0: there must be none). Raises
        ValueError for a name or a body that cannot be one (``check_document``).
        """

    @abstractmethod
    async def read(self, folder: str, since: Mark = BEGINNING) -> Page:
        """The documents of a folder that were written after ``since``, at most ``PAGE`` and about ``PAGE_BYTES``."""

    async def read_all(self, folder: str) -> dict[str, Document]:
        """Every document of a folder, by name, in the order of their writing. As many round trips as there are pages."""
        found: dict[str, Document] = {}
        mark, caught_up = BEGINNING, False
        while not caught_up:
            page = await self.read(folder, mark)
            for document in page.documents:
                found.pop(document.name, None)
                found[document.name] = document
            mark, caught_up = page.mark, page.caught_up
        return found


def check_document(name: str, body: bytes) -> str:
    """The folder of a document. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a folder and a name of letters, digits and ._:/-, joined by /")
    if len(body) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{name} has {len(body)} bytes, more than {MAX_DOCUMENT_BYTES}")
    return name.partition("/")[0]
