"""Pages of SGLang's host pools, and the bytes of a block that they become.

``CanonicalPages`` sees through SGLang's memory layouts and moves a rank's heads to their place in a canonical
block. ``OpaquePages`` moves a page as it is, piece by piece. Both copy in the calling thread, with the interpreter lock released:
torch would copy with threads of its own, which on a busy machine wait for each other longer than they copy.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore.errors import IdentityError
from kvstore.layout import BlockLayout

AXES = ("kv", "page", "head", "token", "layer")
"""How ``page_view`` orders the axes; what is left is the row: one token of one head of one layer."""

LAYOUTS = {
    "layer_first": ("kv", "layer", "page", "token", "head"),
    "page_first": ("kv", "page", "token", "layer", "head"),
    "page_first_direct": ("kv", "page", "layer", "token", "head"),
    "page_head": ("kv", "page", "head", "token", "layer"),
}
"""SGLang's ``--hicache-mem-layout``: order of the axes in a host pool's buffer. ``page_head`` is our canonical order."""

Bytes = npt.NDArray[np.uint8]

Place = Any
"""Where a page is in its pool; only the ``Pages`` that made it reads it."""


class Pages(ABC):
    """The pages of one host pool. Any thread may call."""

    block_bytes: int
    """Payload bytes of a whole block, all ranks together."""

    @abstractmethod
    def places(self, host_indices: torch.Tensor, count: int) -> Sequence[Place]:
        """Where the ``count`` pages of these token slots are. Raises IdentityError when they are not that many pages."""

    @abstractmethod
    def save(self, place: Place, payload: memoryview) -> None:
        """Copy this rank's part of a page into a block's payload."""

    @abstractmethod
    def load(self, place: Place, payload: memoryview) -> None:
        """Copy this rank's part of a block's payload into a page."""

    @abstractmethod
    def pieces(self, place: Place) -> Sequence[memoryview]:
        """The page's memory, where it is a block's payload piece by piece; empty where pages are converted."""


class CanonicalPages(Pages):
    """Pages of a plain MHA or MLA pool, one to a canonical block of ``layout``."""

    def __init__(self, pool: Any, layout: BlockLayout, heads: tuple[int, int]) -> None:
        """The pool holds ``heads`` of each block. Raises IdentityError when it does not."""
        self.block_bytes = layout.nbytes
        self._page_tokens = layout.tokens
        self._view: Bytes = page_view(pool).numpy()
        self._shape = (layout.kv, layout.kv_heads, layout.tokens, layout.layers, layout.head_dim * layout.itemsize)
        self._heads = slice(*heads)
        have = (self._view.shape[0], *self._view.shape[2:])
        need = (layout.kv, heads[1] - heads[0], *self._shape[2:])
        if have != need:
            raise IdentityError(f"pages of (kv, heads, tokens, layers, row bytes) {have} are not the wanted {need}")
        self._is_block = heads == (0, layout.kv_heads) and self._view[0, 0].flags.c_contiguous

    def places(self, host_indices: torch.Tensor, count: int) -> Sequence[Place]:
        size = self._page_tokens
        if host_indices.numel() != count * size:
            raise IdentityError(f"{host_indices.numel()} token slots are not {count} pages of {size}")
        slots = host_indices.reshape(count, size)
        first = slots[:, 0]
        whole = not bool((first % size).any()) and torch.equal(slots, first[:, None] + torch.arange(size))
        if count and not (whole and 0 <= int(first.min()) <= int(first.max()) < self._slots):
            raise IdentityError("the token slots are not whole pages of the host pool")
        places: list[int] = (first // size).tolist()
        return places

    def save(self, place: Place, payload: memoryview) -> None:
        np.copyto(self._share(payload), self._view[:, place])

    def load(self, place: Place, payload: memoryview) -> None:
        np.copyto(self._view[:, place], self._share(payload))

    def pieces(self, place: Place) -> Sequence[memoryview]:
        return [memoryview(half).cast("B") for half in self._view[:, place]] if self._is_block else []

    @property
    def _slots(self) -> int:
        return int(self._view.shape[1]) * self._page_tokens

    def _share(self, payload: memoryview) -> Bytes:
        """This rank's ``[kv, head, token, layer, byte]`` of a block. An MLA block has one "head" and only one "kv"."""
        return np.frombuffer(payload, np.uint8).reshape(self._shape)[:, self._heads]


class OpaquePages(Pages):
    """Pages as they are, in the order of the pieces that the pool names."""

    def __init__(self, pool: Any) -> None:
        """Raises IdentityError when the pool does not name the pieces of its pages."""
        self._pool = pool
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        try:
            pieces = self._pieces(torch.arange(self.page_tokens, dtype=torch.int64), 1)[0]
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise IdentityError(f"{type(pool).__name__} does not say where its pages are: {error}") from error
        self.block_bytes = sum(size for _, size in pieces)

    def places(self, host_indices: torch.Tensor, count: int) -> Sequence[Place]:
        if host_indices.numel() != count * self.page_tokens:
            raise IdentityError(f"{host_indices.numel()} token slots are not {count} pages of {self.page_tokens}")
        return self._pieces(host_indices, count)

    def save(self, place: Place, payload: memoryview) -> None:
        at = _address(payload)
        for address, size in place:
            ctypes.memmove(at, address, size)
            at += size

    def load(self, place: Place, payload: memoryview) -> None:
        at = _address(payload)
        for address, size in place:
            ctypes.memmove(address, at, size)
            at += size

    def pieces(self, place: Place) -> Sequence[memoryview]:
        return [memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B") for address, size in place]

    def _pieces(self, host_indices: torch.Tensor, count: int) -> list[list[tuple[int, int]]]:
        addresses, sizes = self._pool.get_page_buffer_meta(host_indices)
        pieces = list(zip(addresses, sizes, strict=True))
        each = len(pieces) // count if count else 0
        if each * count != len(pieces):
            raise IdentityError(f"{len(pieces)} pieces are not {count} pages")
        return [pieces[index * each : (index + 1) * each] for index in range(count)]


def page_view(pool: Any) -> torch.Tensor:
    """A host pool's buffer as ``[kv, page, head, token, layer, row byte]``, without a copy. Raises IdentityError."""
    order = LAYOUTS.get(pool.layout)
    if order is None:
        raise IdentityError(f"host pool layout {pool.layout!r} is not one of {', '.join(LAYOUTS)}")
    buffer = pool.kv_buffer.view(torch.uint8)
    kv = 1 if is_mla(pool) else 2
    pages = pool.size // pool.page_size
    heads = 1 if kv == 1 else pool.head_num
    sizes = {"kv": kv, "page": pages, "head": heads, "token": pool.page_size, "layer": pool.layer_num}
    shape = [sizes[axis] for axis in order]
    cells = kv * pages * heads * pool.page_size * pool.layer_num
    if not buffer.is_contiguous() or buffer.numel() % cells:
        raise IdentityError(f"a host pool of shape {tuple(pool.kv_buffer.shape)} is not {sizes}")
    return buffer.view(*shape, buffer.numel() // cells).permute(*(order.index(axis) for axis in AXES), len(AXES))


def is_plain(pool: Any) -> bool:
    """Whether a pool holds K and V (or a latent) of its layers and nothing else, in an order that we know."""
    if type(pool).__name__ not in ("MHATokenToKVPoolHost", "MLATokenToKVPoolHost") or pool.layout not in LAYOUTS:
        return False
    if pool.layer_num != getattr(pool, "target_layer_num", pool.layer_num) or not isinstance(
        pool.kv_buffer, torch.Tensor
    ):
        return False
    return bool(is_mla(pool) or getattr(pool, "v_head_dim", pool.head_dim) == pool.head_dim)


def is_mla(pool: Any) -> bool:
    """Whether a pool holds one latent a token."""
    return type(pool).__name__ == "MLATokenToKVPoolHost"


def _address(payload: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(payload))
