"""The canonical block layout, and which of its bytes a TP rank, a layer range or a page owns.

A block holds ``tokens`` consecutive tokens of all layers and all KV heads. The canonical order of its axes is
``[k|v][kv_head][token][layer][dim]``: SGLang's ``page_head`` page. A TP rank's share (a head range) is one run of the K half
and one of the V half. Other orders are rows of ``ORDERS``; the arithmetic below works for any order, also for one that
splits the head axis in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from kvstore.errors import IdentityError


class Axis(Enum):
    KV = "kv"
    """K, then V; size 1 for MLA's single latent."""
    HEAD = "head"
    TOKEN = "token"
    LAYER = "layer"
    DIM = "dim"


class Run(NamedTuple):
    """A contiguous byte range of a block."""

    offset: int
    length: int


class Interval(NamedTuple):
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Dim:
    """One physical dimension: ``step`` logical indices of ``axis`` per index (above 1 when an axis is split)."""

    axis: Axis
    size: int
    step: int = 1


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Geometry and byte order of one block.

    ``head_groups`` only matters to orders that split the head axis; 1 means unsplit.
    """

    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int
    kv: int = 2
    order: str = "kv_head_token_layer"
    head_groups: int = 1

    def __post_init__(self) -> None:
        for field in ("tokens", "layers", "kv_heads", "head_dim", "itemsize", "head_groups"):
            if getattr(self, field) < 1:
                raise IdentityError(f"layout field {field} is {getattr(self, field)}; it must be at least 1")
        if self.kv not in (1, 2):
            raise IdentityError(f"layout field kv is {self.kv}; it is 2 for K and V, 1 for an MLA latent")
        if self.order not in ORDERS:
            raise IdentityError(f"layout order {self.order!r} is unknown; known: {', '.join(sorted(ORDERS))}")
        if self.kv_heads % self.head_groups:
            raise IdentityError(f"{self.kv_heads} KV heads do not divide into {self.head_groups} groups")

    @property
    def name(self) -> str:
        """What goes into ``Namespace.layout``."""
        groups = f":g{self.head_groups}" if self.head_groups > 1 else ""
        return f"canonical:{self.order}{groups}"

    @property
    def nbytes(self) -> int:
        return self.kv * self.kv_heads * self.tokens * self.layers * self.head_dim * self.itemsize

    def size(self, axis: Axis) -> int:
        return {
            Axis.KV: self.kv,
            Axis.HEAD: self.kv_heads,
            Axis.TOKEN: self.tokens,
            Axis.LAYER: self.layers,
            Axis.DIM: self.head_dim,
        }[axis]

    def dims(self) -> tuple[Dim, ...]:
        """Physical dimensions, outermost first."""
        per_group = self.kv_heads // self.head_groups
        out = []
        for part in ORDERS[self.order]:
            if part == "head_group":
                out.append(Dim(Axis.HEAD, self.head_groups, per_group))
            elif part == "head_in_group":
                out.append(Dim(Axis.HEAD, per_group))
            else:
                out.append(Dim(Axis(part), self.size(Axis(part))))
        return tuple(out)

    def runs(
        self,
        heads: tuple[int, int] | None = None,
        layers: tuple[int, int] | None = None,
        tokens: tuple[int, int] | None = None,
        kv: tuple[int, int] | None = None,
    ) -> tuple[Run, ...]:
        """Byte ranges, ascending and maximal, of the selected half-open index ranges; None selects the whole axis."""
        chosen = {Axis.HEAD: heads, Axis.LAYER: layers, Axis.TOKEN: tokens, Axis.KV: kv, Axis.DIM: None}
        selection = []
        for axis in Axis:
            start, stop = chosen[axis] or (0, self.size(axis))
            if not 0 <= start < stop <= self.size(axis):
                raise IdentityError(f"{axis.value} range {start}:{stop} is not inside 0:{self.size(axis)}")
            selection.append((axis, Interval(start, stop)))
        return _runs(self, tuple(selection))

    def rank_heads(self, rank: int, ranks: int) -> tuple[int, int]:
        """Head range of a TP rank. With more ranks than heads, neighbours hold the same head (a replica)."""
        if not 0 <= rank < ranks:
            raise IdentityError(f"rank {rank} is not one of {ranks}")
        if ranks > self.kv_heads:
            if ranks % self.kv_heads:
                raise IdentityError(f"{ranks} ranks do not share {self.kv_heads} KV heads evenly")
            head = rank // (ranks // self.kv_heads)
            return head, head + 1
        if self.kv_heads % ranks:
            raise IdentityError(f"{self.kv_heads} KV heads do not divide among {ranks} ranks")
        share = self.kv_heads // ranks
        return rank * share, (rank + 1) * share


ORDERS: dict[str, tuple[str, ...]] = {
    "kv_head_token_layer": ("kv", "head", "token", "layer", "dim"),
    # SGLang's page_unified: partition axes outermost.
    "headgroup_layer_kv_token_head": ("head_group", "layer", "kv", "token", "head_in_group", "dim"),
    # MLA latents have no heads and no K/V split.
    "token_layer": ("token", "layer", "dim", "kv", "head"),
}
"""Axis orders, outermost first. A new order is a new row here and nothing else."""


@lru_cache(maxsize=4096)
def _runs(layout: BlockLayout, selection: tuple[tuple[Axis, Interval], ...]) -> tuple[Run, ...]:
    merged: list[Run] = []
    for offset, length in _walk(layout.dims(), dict(selection), layout, 0, layout.nbytes):
        if merged and merged[-1].offset + merged[-1].length == offset:
            merged[-1] = Run(merged[-1].offset, merged[-1].length + length)
        else:
            merged.append(Run(offset, length))
    return tuple(merged)


def _walk(
    dims: tuple[Dim, ...], want: dict[Axis, Interval], layout: BlockLayout, offset: int, nbytes: int
) -> Iterator[Run]:
    """Descend through the dimensions; stop as soon as everything below is wanted."""
    spans = dict.fromkeys(Axis, 1)
    for dim in dims:
        spans[dim.axis] *= dim.size
    if all(want[axis] == (0, spans[axis]) for axis in Axis):
        yield Run(offset, nbytes)
        return
    dim, inner = dims[0], dims[1:]
    stride = nbytes // dim.size
    start, stop = want[dim.axis]
    for index in range(start // dim.step, -(-stop // dim.step)):
        base = index * dim.step
        part = Interval(max(start - base, 0), min(stop - base, dim.step))
        yield from _walk(inner, {**want, dim.axis: part}, layout, offset + index * stride, stride)
