"""How an engine's KV pages lie in memory, and which bytes of a canonical block they become.

Every engine layout is reduced to one form: per K/V half and layer a view ``[page, token, head, dim]`` of the engine's own
tensor. The view's strides are the layout; nothing is assumed about them except that ``dim`` is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from connectors.paging.base import ABSENT, BlockCopy
from kvstore.errors import IdentityError
from kvstore.layout import Axis, BlockLayout, Run

Pages = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The KV pages of one rank (of one KV cache group), as views of the engine's tensors.

    ``planes[kv][layer]``: K then V, or one latent for MLA. All planes have the same shape, dtype, device and strides.
    """

    planes: tuple[tuple[torch.Tensor, ...], ...]
    subpages: int = 1
    """Consecutive pages of the views that make one page of the engine: an engine may keep its cache in smaller
    units than it counts in (vLLM's kernel blocks)."""
    tables: tuple[int, ...] = ()
    """Which of the engine's page tables each layer goes by, counted from 0; empty: all by one."""

    def __post_init__(self) -> None:
        first = self.planes[0][0]
        if first.ndim != 4 or first.stride(3) != 1:
            raise IdentityError(f"a page view is [page, token, head, dim] with contiguous dim, not {_describe(first)}")
        for plane in (plane for planes in self.planes for plane in planes):
            if _form(plane) != _form(first):
                raise IdentityError(f"layers of one group differ: {_describe(first)} and {_describe(plane)}")
        if len({len(planes) for planes in self.planes}) != 1:
            raise IdentityError("K and V have different numbers of layers")
        if self.tables and len(self.tables) != self.layers:
            raise IdentityError(f"page tables are given for {len(self.tables)} layers of {self.layers}")

    @property
    def sample(self) -> torch.Tensor:
        """Any one plane: its shape, dtype, strides and device are those of all."""
        return self.planes[0][0]

    @property
    def layers(self) -> int:
        return len(self.planes[0])

    @property
    def table_count(self) -> int:
        return max(self.tables, default=0) + 1

    @property
    def heads(self) -> int:
        return int(self.sample.shape[2])

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head of one layer: the longest run every layout keeps together."""
        return int(self.sample.shape[3] * self.sample.element_size())

    @property
    def page_tokens(self) -> int:
        """Tokens of one page of the views."""
        return int(self.sample.shape[1])

    def view_pages(self, copies: Sequence[BlockCopy], tokens: int, whole: bool = False) -> Pages:
        """The pages of the views that hold each block of ``tokens`` tokens: ``[block, table x page]``, ABSENT for none.

        ``whole``: every page must be there. Raises IdentityError for pages that are not in the cache or not in the block.
        """
        pages = int(self.sample.shape[0]) // self.subpages
        tables, count = self.table_count, tokens // (self.page_tokens * self.subpages)
        given = [page for copy in copies for page in copy.pages]
        least = 0 if whole else ABSENT
        if given and not least <= min(given) <= max(given) < pages:
            raise IdentityError(f"pages {min(given)} to {max(given)} are not all inside a cache of {pages} pages")
        if all(len(copy.pages) == tables * count and not copy.first_page for copy in copies):
            rows = np.array(given, np.int32).reshape(len(copies), tables * count)
        else:
            cut = np.full((len(copies), tables, count), ABSENT, np.int32)
            for row, copy in zip(cut, copies, strict=True):
                taken, rest = divmod(len(copy.pages), tables)
                last = copy.first_page + taken
                if whole or rest or not 0 <= copy.first_page < last <= count:
                    raise IdentityError(f"pages {copy.first_page}:{last} given of a block of {count} pages")
                row[:, copy.first_page : last] = np.reshape(copy.pages, (tables, taken))
            rows = cut.reshape(len(copies), tables * count)
        if self.subpages == 1:
            return rows
        parts = rows[:, :, None] * self.subpages + np.arange(self.subpages, dtype=np.int32)
        return np.where(rows[:, :, None] == ABSENT, np.int32(ABSENT), parts).reshape(len(copies), -1)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a block that one rank holds: a range of its KV heads."""

    block: BlockLayout
    heads: tuple[int, int]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Byte ranges of the block, ascending; together, back to back, they are ``compact``."""
        return self.block.runs(heads=self.heads)

    @property
    def compact(self) -> BlockLayout:
        """The share alone, as a block of fewer heads in the same order."""
        return replace(self.block, kv_heads=self.heads[1] - self.heads[0])

    @property
    def nbytes(self) -> int:
        return self.compact.nbytes

    @classmethod
    def of(cls, pages: PagedKV, block: BlockLayout, heads: tuple[int, int]) -> Share:
        """Check that ``pages`` hold heads ``heads`` of blocks laid out as ``block``. Raises IdentityError."""
        share = cls(block, heads)
        have = (len(pages.planes), pages.layers, pages.heads, pages.row_bytes)
        need = (block.kv, block.layers, heads[1] - heads[0], block.head_dim * block.itemsize)
        if have != need or not share.runs:
            raise IdentityError(f"pages of (kv, layers, heads, row bytes) {have} cannot hold a share of {need}")
        if block.tokens % (pages.page_tokens * pages.subpages):
            raise IdentityError(
                f"blocks of {block.tokens} tokens are not made of pages of {pages.page_tokens * pages.subpages}"
            )
        return share


@dataclass(frozen=True, slots=True)
class Strides:
    """Bytes from one index of an axis to the next in a block."""

    kv: int
    head: int
    token: int
    layer: int


def strides(layout: BlockLayout) -> Strides:
    """Raises IdentityError for an order that splits the head axis in two: its heads have no single stride."""
    if layout.head_groups != 1:
        raise IdentityError(f"paging to {layout.name} is not supported: its head axis is split")
    step, found = layout.nbytes, {}
    for dim in layout.dims():
        step //= dim.size
        if dim.size > 1 or dim.axis not in found:
            found[dim.axis] = step
    return Strides(found[Axis.KV], found[Axis.HEAD], found[Axis.TOKEN], found[Axis.LAYER])


def vllm_pages(
    caches: Iterable[torch.Tensor], block: BlockLayout, page_tokens: int, tables: tuple[int, ...] = ()
) -> PagedKV:
    """vLLM's caches, one a layer, in layer order; ``page_tokens`` is the engine's block size, ``tables`` as in ``PagedKV``.

    Logical views, whatever their strides: ``[B, H, N, 2 * dim]`` with K and V packed in the last axis, ``[B, 2 * H, N, dim]``
    with the K heads first, ``[B, 2, N, H, dim]``, and for MLA ``[B, 1, N, dim]`` or (0.26) ``[B, N, dim]``.
    Raises IdentityError for any other.
    """
    halves = [_split(cache, block) for cache in caches]
    planes = tuple(zip(*halves, strict=True))
    subpages, rest = divmod(page_tokens, int(planes[0][0].shape[1]))
    if rest or not subpages:
        raise IdentityError(f"a cache with {planes[0][0].shape[1]} tokens a page cannot hold pages of {page_tokens}")
    return PagedKV(planes, subpages, tables)


def sglang_pages(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None, page_tokens: int) -> PagedKV:
    """SGLang's device pools: per layer ``[token slots, heads, dim]``, a page being ``page_tokens`` consecutive slots.

    ``keys`` and ``values`` are the pool's ``k_buffer`` and ``v_buffer``; an MLA pool's ``kv_buffer`` goes alone.
    """

    def plane(buffer: torch.Tensor) -> torch.Tensor:
        pages = buffer.shape[0] // page_tokens
        return buffer[: pages * page_tokens].unflatten(0, (pages, page_tokens))

    halves = [keys] if values is None else [keys, values]
    return PagedKV(tuple(tuple(plane(buffer) for buffer in half) for half in halves))


def _split(cache: torch.Tensor, block: BlockLayout) -> tuple[torch.Tensor, ...]:
    """The K and V (or latent) planes of one of vLLM's per-layer caches."""
    dim = block.head_dim
    if cache.ndim == 3 and block.kv == 1 and cache.shape[2] == dim:
        return (cache.unsqueeze(2),)
    if cache.ndim == 4 and cache.shape[3] == block.kv * dim:
        tokens_first = cache.transpose(1, 2)
        return tuple(tokens_first[..., i * dim : (i + 1) * dim] for i in range(block.kv))
    if cache.ndim == 4 and cache.shape[3] == dim and cache.shape[1] % 2 == 0 and block.kv == 2:
        heads = cache.shape[1] // 2
        return tuple(cache[:, i * heads : (i + 1) * heads].transpose(1, 2) for i in range(2))
    if cache.ndim == 5 and cache.shape[1] == 2 and cache.shape[4] == dim and block.kv == 2:
        return cache[:, 0], cache[:, 1]
    raise IdentityError(
        f"a cache {_describe(cache)} does not hold blocks of {block.kv} x {dim} elements a token and head"
    )


def _form(plane: torch.Tensor) -> tuple[object, ...]:
    return plane.shape, plane.stride(), plane.dtype, plane.device


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
