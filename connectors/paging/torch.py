"""Pager for engine pages in host memory: whole pages as opaque bytes.

What is inside a page is the engine's affair (vLLM's CPU kernels pack K and V their own way), so a payload is
``[rank][page][layer][page bytes]`` and goes back only to the same kind of engine.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from connectors.paging.base import ABSENT, BlockCopy, Pager, Transfer
from kvstore.errors import ConfigError
from kvstore.node.arena import Arena

Rows = npt.NDArray[np.uint8]


class Finished:
    """A transfer that was over before it was returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def precede(self) -> None:
        return


class OpaquePager(Pager):
    """Copies pages in the calling thread; numpy releases the GIL while it copies.

    ``kv_caches`` maps each layer, in payload order, to its tensor; the tensor's first dimension runs over pages, or over
    equal parts of them. ``pages`` is the number of pages, ``rank`` and ``ranks`` say which part of a payload is ours.
    ``tables`` says which of the engine's page tables each layer goes by; empty: all by one.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        pages: int,
        pages_per_block: int,
        rank: int = 0,
        ranks: int = 1,
        tables: Sequence[int] = (),
    ) -> None:
        self._layers = [page_rows(name, tensor, pages) for name, tensor in kv_caches.items()]
        self._pages_per_block = pages_per_block
        self._tables = tuple(tables) or (0,) * len(self._layers)
        self._table_count = max(self._tables) + 1
        self.page_bytes = sum(rows.shape[1] for rows in self._layers)
        """Bytes of one page, all layers of this rank."""
        share = self.page_bytes * pages_per_block
        self.block_bytes = share * ranks
        self._share = rank * share
        self._arena: Arena | None = None

    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        for copy in copies:
            if copy.first_page or ABSENT in copy.pages or len(copy.pages) != self._pages_per_block * self._table_count:
                raise ValueError(f"a save writes all {self._pages_per_block} pages of a block, not {len(copy.pages)}")
        self._each(arena, copies, to_arena=True)
        return Finished()

    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        self._each(arena, copies, to_arena=False)
        return Finished()

    def _each(self, arena: Arena, copies: Sequence[BlockCopy], to_arena: bool) -> None:
        self._prepare(arena)
        buffer = np.frombuffer(arena.buffer, np.uint8)
        for copy in copies:
            count = len(copy.pages) // self._table_count
            at = copy.offset + self._share + copy.first_page * self.page_bytes
            for index in range(count):
                for rows, table in zip(self._layers, self._tables, strict=True):
                    page, end = copy.pages[table * count + index], at + rows.shape[1]
                    if page != ABSENT and to_arena:
                        buffer[at:end] = rows[page]
                    elif page != ABSENT:
                        rows[page] = buffer[at:end]
                    at = end

    def ready(self, arena: Arena) -> bool:
        return True

    def forget(self) -> None:
        self._arena = None

    def close(self) -> None:
        self._layers = []
        self._arena = None

    def _prepare(self, arena: Arena) -> None:
        """Have a new arena mapped in the background: a first touch of its pages costs several times the copy."""
        if arena is not self._arena:
            self._arena = arena
            threading.Thread(target=arena.populate, name="kvstore-populate", daemon=True).start()


def page_rows(name: str, tensor: torch.Tensor, pages: int) -> Rows:
    """View of a layer's cache as ``[page, byte]``. Raises ConfigError when a page is not one run of memory."""
    if pages < 1 or tensor.dim() < 1 or tensor.shape[0] % pages:
        raise ConfigError(
            "kv_caches", tuple(tensor.shape), f"layer {name} does not hold {pages} pages", "This is a bug."
        )
    parts = tensor.shape[0] // pages
    page = tensor[:parts]
    itemsize = tensor.element_size()
    expected = 1
    for size, stride in sorted(zip(page.shape, page.stride(), strict=True), key=lambda axis: axis[1]):
        if size != 1 and stride != expected:
            raise ConfigError(
                "kv_cache_layout",
                tensor.stride(),
                f"a page of layer {name} is not contiguous",
                "Use layout LBHNC or LBNHC.",
            )
        expected *= size
    raw = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * itemsize,
        (pages, page.numel() * itemsize),
        (parts * tensor.stride(0) * itemsize, 1),
    )
    rows: Rows = raw.numpy()
    return rows
