"""Counts what loads bring."""

from __future__ import annotations

from collections.abc import Sequence

from connectors.paging.base import ABSENT, BlockCopy
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from kvstore.tiers.base import Medium


class Tally:
    """Of one rank. Any thread may call."""

    def __init__(self, geometry: Geometry, rank: int, recorder: Recorder) -> None:
        self._geometry = geometry
        self._rank = rank
        self._recorder = recorder
        self._page_bytes = [geometry.page_bytes(table) for table in range(len(geometry.tables.windows))]

    def loaded(self, copies: Sequence[BlockCopy], media: Sequence[Medium]) -> int:
        """Copies have arrived, of blocks that came from ``media``; the bytes they moved."""
        nbytes = sum(map(self._bytes, copies))
        self._recorder.count("bytes_loaded", nbytes)
        if self._rank == 0:
            for copy, medium in zip(copies, media, strict=True):
                pages = len(copy.pages) // len(self._page_bytes)
                self._recorder.count("tokens_loaded", pages * self._geometry.page_tokens, medium.value)
        return nbytes

    def state_loaded(self) -> None:
        """The state behind blocks has arrived."""
        assert self._geometry.states is not None
        self._recorder.count("bytes_loaded", self._geometry.states.share(self._rank).nbytes)

    def _bytes(self, copy: BlockCopy) -> int:
        count = len(copy.pages) // len(self._page_bytes)
        kept = [count - copy.pages[at : at + count].count(ABSENT) for at in range(0, len(copy.pages), count)]
        return sum(pages * nbytes for pages, nbytes in zip(kept, self._page_bytes, strict=True))
