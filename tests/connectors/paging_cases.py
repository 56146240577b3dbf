"""Random engines: geometries, physical layouts, dtypes and page sizes, for the paging suites."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from connectors.paging.base import ABSENT, BlockCopy, Pager
from connectors.paging.geometry import PagedKV, sglang_pages, vllm_pages
from connectors.paging.parted import Part, PartedPager
from connectors.paging.reference import ReferencePager
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32)
VLLM_ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
"""vLLM's physical orders of the logical axes (layer, page, head, token, content)."""
GQA_LAYOUTS = (*VLLM_ORDERS, "padded", "kv_heads", "kv_pages", "subpages", "sglang")
MLA_LAYOUTS = ("LBHNC", "BLHNC", "mla_3d", "subpages", "sglang")
STATE_LAYOUTS = ("LBHNC", "BLHNC", "padded")
"""Of recurrent layers' states: one a page, opaque."""
SLOT_ALIGNMENT = 4096


@dataclass(frozen=True)
class Case:
    """One rank's engine: its share of ``block`` in pages of ``page_tokens`` tokens."""

    block: BlockLayout
    heads: tuple[int, int]
    dtype: torch.dtype
    layout: str
    page_tokens: int
    pages: int

    def build(self, device: str) -> PagedKV:
        """Uninitialised pages in this physical layout."""
        heads, dim, layers = self.heads[1] - self.heads[0], self.block.head_dim, self.block.layers
        tokens, content = self.page_tokens, self.block.kv * self.block.head_dim

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.dtype, device=device)

        match self.layout:
            case "sglang":
                pools = [
                    [empty(self.pages * tokens + 1, heads, dim) for _ in range(layers)] for _ in range(self.block.kv)
                ]
                return sglang_pages(pools[0], pools[1] if self.block.kv == 2 else None, tokens)
            case "subpages":
                halves = [empty(2 * self.pages, heads, tokens // 2, content) for _ in range(layers)]
                return vllm_pages(halves, self.block, tokens)
            case "padded":
                caches = [empty(self.pages, heads * tokens * content + 3)[:, 3:] for _ in range(layers)]
                return vllm_pages([c.unflatten(1, (heads, tokens, content)) for c in caches], self.block, tokens)
            case "kv_heads":
                return vllm_pages(
                    [empty(self.pages, 2 * heads, tokens, dim) for _ in range(layers)], self.block, tokens
                )
            case "kv_pages":
                return vllm_pages([empty(self.pages, 2, tokens, heads, dim) for _ in range(layers)], self.block, tokens)
            case "mla_3d":
                return vllm_pages([empty(self.pages, tokens, dim) for _ in range(layers)], self.block, tokens)
            case name:
                order = VLLM_ORDERS[name]
                logical = (layers, self.pages, heads, tokens, content)
                physical = empty(*(logical[axis] for axis in order))
                return vllm_pages(physical.permute([order.index(axis) for axis in range(5)]), self.block, tokens)

    def copies(self, choice: random.Random, slots: int = 3) -> list[BlockCopy]:
        """Disjoint random pages to disjoint slots, in random order."""
        per_block = self.block.tokens // self.page_tokens
        count = min(slots, self.pages // per_block)
        ids = choice.sample(range(self.pages), count * per_block)
        step = -(-self.block.nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        places = choice.sample(range(count), count)
        return [
            BlockCopy(tuple(ids[i * per_block : (i + 1) * per_block]), SLOT_ALIGNMENT + places[i] * step)
            for i in range(count)
        ]

    def partial(self, choice: random.Random, copies: Sequence[BlockCopy]) -> list[BlockCopy]:
        """A random part of the pages of each copy, from the same slots."""
        out = []
        for copy in copies:
            first = choice.randrange(len(copy.pages))
            stop = choice.randrange(first, len(copy.pages)) + 1
            out.append(BlockCopy(copy.pages[first:stop], copy.offset, first))
        return out

    def one_copy(self) -> BlockCopy:
        """The first pages, in order."""
        return BlockCopy(tuple(range(self.block.tokens // self.page_tokens)), SLOT_ALIGNMENT)

    def relaid(self) -> Case:
        """The same share in another layout, with pages as large as a block."""
        layout = "sglang" if self.layout != "sglang" else "LBHNC"
        return replace(self, layout=layout, page_tokens=self.block.tokens)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(("gqa", "mla", "state")))
    state, mla = kind == "state", kind == "mla"
    dtype = torch.int8 if state else draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(STATE_LAYOUTS if state else MLA_LAYOUTS if mla else GQA_LAYOUTS))
    page_tokens = 1 if state else draw(st.sampled_from((2, 4) if layout == "subpages" else (1, 2, 3, 4)))
    per_block = 1 if state else draw(st.integers(1, 3))
    kv_heads = 1 if mla else draw(st.integers(1, 4))
    orders = ("kv_head_token_layer",) if state else ("kv_head_token_layer", "headgroup_layer_kv_token_head")
    first = draw(st.integers(0, kv_heads - 1))
    block = BlockLayout(
        tokens=page_tokens * per_block,
        layers=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 3, 8, 20, 64))),
        itemsize=dtype.itemsize,
        kv=2 if kind == "gqa" else 1,
        order="token_layer" if mla else draw(st.sampled_from(orders)),
    )
    return Case(
        block=block,
        heads=(first, draw(st.integers(first + 1, kv_heads))),
        dtype=dtype,
        layout=layout,
        page_tokens=page_tokens,
        pages=draw(st.integers(per_block, 3 * per_block + 1)),
    )


def random_fill(pages: PagedKV, seed: int) -> PagedKV:
    """Random bytes in every plane: NaNs and infinities of every dtype included."""
    generator = torch.Generator(pages.sample.device).manual_seed(seed)
    for plane in _all(pages):
        raw = plane.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, device=raw.device, generator=generator))
    return pages


def engine_bytes(pages: PagedKV) -> torch.Tensor:
    """A copy of everything in the pages: ``[page, plane, token, head, byte]``."""
    return torch.stack([plane.view(torch.uint8) for plane in _all(pages)], dim=1)


def _all(pages: PagedKV) -> Sequence[torch.Tensor]:
    return [plane for half in pages.planes for plane in half]


HYBRID = BlockLayout(tokens=8, layers=3, kv_heads=2, head_dim=16, itemsize=2)
"""The layers of one kind of attention; a hybrid block has two such parts."""


def check_hybrid(make: Callable[[PagedKV, BlockLayout, tuple[int, int]], Pager], device: str, arena: Arena) -> None:
    """A hybrid model's block through pagers that ``make`` makes, against the reference: saved whole, loaded in part."""

    def parted(make: Callable[[PagedKV, BlockLayout, tuple[int, int]], Pager], engine: Sequence[PagedKV]) -> Pager:
        return PartedPager([Part(make(engine[0], HYBRID, (0, 2)), (1,)), Part(make(engine[1], HYBRID, (0, 2)), (0, 2))])

    def build(seed: int) -> list[PagedKV]:
        caches = [torch.empty(40, 2, 4, 32, dtype=torch.bfloat16, device=device) for _ in range(6)]
        parts = [vllm_pages(caches[:3], HYBRID, 4), vllm_pages(caches[3:], HYBRID, 4, (0, 1, 0))]
        return [random_fill(part, seed + i) for i, part in enumerate(parts)]

    choice = random.Random(3)
    rows = [choice.sample(range(40), 6) for _ in range(4)]
    slot = -(-2 * HYBRID.nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    places = [slot * (i + 1) for i in range(4)]
    whole = [BlockCopy(tuple(row), at) for row, at in zip(rows, places, strict=True)]
    some = [BlockCopy((ABSENT, ABSENT, *copy.pages[2:4], ABSENT, ABSENT), copy.offset) for copy in whole[:3]]
    some.append(BlockCopy(whole[3].pages[1::2], whole[3].offset, first_page=1))
    results = []
    for maker in (ReferencePager, make):
        arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
        engine = build(1)
        pager = parted(maker, engine)
        try:
            pager.save(arena, whole).wait()
            for part in engine:
                random_fill(part, 9)
            pager.load(arena, some).wait()
        finally:
            pager.close()
        results.append((bytes(arena.buffer), [engine_bytes(part) for part in engine]))
    (arena_of_reference, ours), (arena_of_pager, theirs) = results
    assert arena_of_pager == arena_of_reference
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
