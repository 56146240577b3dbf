"""Paging in plain torch: what the kernels must equal byte for byte, and the pager of interpretable pages on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from connectors.paging.base import ABSENT, BlockCopy, Pager
from connectors.paging.geometry import PagedKV, Share, strides
from kvstore.errors import KVStoreError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena


class ReferencePager(Pager):
    """Indexes page by page, layer by layer, and has finished when ``save`` or ``load`` returns."""

    def __init__(self, pages: PagedKV, block: BlockLayout, heads: tuple[int, int]) -> None:
        """``heads``: the range of the block's KV heads in ``pages``. Raises IdentityError when they do not fit."""
        self.block_bytes = block.nbytes
        self._pages = pages
        self._share = Share.of(pages, block, heads)

    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> Finished:
        return self._each(arena, copies, to_arena=True)

    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> Finished:
        return self._each(arena, copies, to_arena=False)

    def ready(self, arena: Arena) -> bool:
        return True

    def close(self) -> None:
        """Nothing is in flight and nothing is registered."""

    def _each(self, arena: Arena, copies: Sequence[BlockCopy], to_arena: bool) -> Finished:
        block = self._share.block
        try:
            rows = self._pages.view_pages(copies, block.tokens, whole=to_arena)
            for copy, pages in zip(copies, rows, strict=True):
                slot = torch.frombuffer(arena.slot(copy.offset, block.nbytes), dtype=torch.uint8)
                self._move(slot, pages.tolist(), to_arena)
        except (KVStoreError, ValueError) as error:
            return Finished(error)
        return Finished()

    def _move(self, slot: torch.Tensor, pages: list[int], to_arena: bool) -> None:
        """One block. ``slot`` is its whole payload, of which this rank's heads are touched."""
        block, (first, stop) = self._share.block, self._share.heads
        step = strides(block)
        tokens_of_page = self._pages.page_tokens
        for kv, planes in enumerate(self._pages.planes):
            for layer, plane in enumerate(planes):
                rows = plane.view(torch.uint8)
                of_table = len(pages) // self._pages.table_count
                first_of_table = (self._pages.tables[layer] if self._pages.tables else 0) * of_table
                for index, page in enumerate(pages[first_of_table : first_of_table + of_table]):
                    if page == ABSENT:
                        continue
                    origin = kv * step.kv + first * step.head + index * tokens_of_page * step.token + layer * step.layer
                    stored = slot.as_strided(
                        (tokens_of_page, stop - first, self._pages.row_bytes), (step.token, step.head, 1), origin
                    )
                    if to_arena:
                        stored.copy_(rows[page])
                    else:
                        rows[page].copy_(stored)


class Finished:
    """A transfer that is over."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        if self._error is not None:
            raise self._error

    def precede(self) -> None:
        self.wait()
