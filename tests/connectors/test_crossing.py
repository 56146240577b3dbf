"""Blocks pass between page layouts of vLLM and SGLang at any tensor-parallel degrees, bit for bit.

SGLang's memory layouts are made here by their shapes; ``tests/e2e/sglang/crossing.py`` does the same with SGLang's own classes
and through a node.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import DTYPES, GQA_LAYOUTS, MLA_LAYOUTS, Case

from connectors.modelid import rope_text
from connectors.paging.base import BlockCopy
from connectors.paging.reference import ReferencePager
from connectors.sglang.pages import LAYOUTS, CanonicalPages, page_view
from kvstore.errors import IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

DEGREES = (1, 2, 4, 8)
SGLANG_MLA = ("layer_first", "page_first", "page_first_direct")
OFFSET = 4096


class MHATokenToKVPoolHost:
    """As SGLang's class of that name lays its buffer out."""

    def __init__(self, layout: str, block: BlockLayout, heads: int, pages: int, dtype: torch.dtype) -> None:
        self.layout, self.page_size, self.size = layout, block.tokens, pages * block.tokens
        self.head_num, self.layer_num, self.dtype = heads, block.layers, dtype
        sizes = {"kv": block.kv, "page": pages, "head": heads, "token": block.tokens, "layer": block.layers}
        order = [axis for axis in LAYOUTS[layout] if block.kv == 2 or axis != "kv"]
        self.kv_buffer = torch.zeros(*(sizes[axis] for axis in order), block.head_dim, dtype=dtype)


class MLATokenToKVPoolHost(MHATokenToKVPoolHost):
    """The same for latents, without a K/V axis."""


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena = Arena.create(4 << 20, epoch=1)
    yield arena
    arena.close()


class Rank:
    """One rank of one engine, with a block in its pages."""

    def __init__(
        self, engine: str, layout: str, block: BlockLayout, heads: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.block, self.heads = block, heads
        count = heads[1] - heads[0]
        if engine == "sglang":
            kind = MHATokenToKVPoolHost if block.kv == 2 else MLATokenToKVPoolHost
            self.pool = kind(layout, block, count, 3, dtype)
            self.canonical = CanonicalPages(self.pool, block, heads)
            self.pager = None
        else:
            tokens = max(block.tokens // 2, 2)
            self.case = Case(block, heads, dtype, layout, tokens, 2 * block.tokens // tokens)
            self.pages = self.case.build("cpu")
            self.ids = tuple(range(block.tokens // tokens))[::-1]
            self.pager = ReferencePager(self.pages, block, heads)

    def put(self, truth: torch.Tensor) -> None:
        for mine, theirs in self._rows(truth):
            mine.copy_(theirs)

    def take(self, truth: torch.Tensor) -> None:
        for mine, theirs in self._rows(truth):
            theirs.copy_(mine)

    def save(self, arena: Arena) -> None:
        if self.pager is None:
            self.canonical.save(1, arena.slot(OFFSET, self.block.nbytes))
        else:
            self.pager.save(arena, [BlockCopy(self.ids, OFFSET)]).wait()

    def load(self, arena: Arena) -> None:
        if self.pager is None:
            self.canonical.load(2, arena.slot(OFFSET, self.block.nbytes))
            page_view(self.pool)[:, 1] = page_view(self.pool)[:, 2]
        else:
            self.pager.load(arena, [BlockCopy(self.ids, OFFSET)]).wait()

    def _rows(self, truth: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's memory beside the same part of ``[kv, head, token, layer, byte]``."""
        share = truth[:, slice(*self.heads)]
        if self.pager is None:
            yield page_view(self.pool)[:, 1], share
            return
        size = self.pages.page_tokens * self.pages.subpages
        for kv, planes in enumerate(self.pages.planes):
            for layer, plane in enumerate(planes):
                rows = plane.view(torch.uint8)
                for place, page in enumerate(self.ids):
                    for part in range(self.pages.subpages):
                        first = place * size + part * self.pages.page_tokens
                        tokens = slice(first, first + self.pages.page_tokens)
                        yield rows[page * self.pages.subpages + part].transpose(0, 1), share[kv, :, tokens, layer]


@st.composite
def crossings(draw: st.DrawFn) -> dict[str, Any]:
    mla, dtype = draw(st.booleans()), draw(st.sampled_from(DTYPES))
    block = BlockLayout(
        tokens=draw(st.sampled_from((4, 8, 16))),
        layers=draw(st.integers(1, 3)),
        kv_heads=1 if mla else draw(st.sampled_from(DEGREES)),
        head_dim=draw(st.sampled_from((3, 8, 64))),
        itemsize=dtype.itemsize,
        kv=1 if mla else 2,
        order="token_layer" if mla else "kv_head_token_layer",
    )
    sides = []
    for _ in ("saver", "loader"):
        engine = draw(st.sampled_from(("vllm", "sglang")))
        known = {
            ("vllm", False): GQA_LAYOUTS,
            ("vllm", True): MLA_LAYOUTS,
            ("sglang", False): tuple(LAYOUTS),
            ("sglang", True): SGLANG_MLA,
        }
        sides.append((engine, draw(st.sampled_from(known[engine, mla])), draw(st.sampled_from(DEGREES))))
    return {"block": block, "dtype": dtype, "sides": sides, "seed": draw(st.integers(0, 2**32))}


def ranks(side: tuple[str, str, int], block: BlockLayout, dtype: torch.dtype) -> list[Rank]:
    engine, layout, degree = side
    heads = [block.rank_heads(rank, degree) if block.kv == 2 else (0, 1) for rank in range(degree)]
    return [Rank(engine, layout, block, each, dtype) for each in heads]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crossing=crossings())
def test_what_one_engine_saved_another_loads(arena: Arena, crossing: dict[str, Any]) -> None:
    """Of ranks that hold the same heads, any one may write."""
    block, dtype, choice = crossing["block"], crossing["dtype"], random.Random(crossing["seed"])
    shape = (block.kv, block.kv_heads, block.tokens, block.layers, block.head_dim * block.itemsize)
    truth = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(crossing["seed"] % 2**31)
    )
    savers, loaders = (ranks(side, block, dtype) for side in crossing["sides"])
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
    writer_of = {rank.heads: rank for rank in choice.sample(savers, len(savers))}
    for rank in writer_of.values():
        rank.put(truth)
        rank.save(arena)
    assert bytes(arena.slot(OFFSET, block.nbytes)) == canonical(truth, block)
    assert not any(arena.slot(0, OFFSET))
    assert not any(arena.slot(OFFSET + block.nbytes, 4096))

    for rank in loaders:
        rank.load(arena)
        held = torch.zeros_like(truth)
        rank.take(held)
        assert torch.equal(held[:, slice(*rank.heads)], truth[:, slice(*rank.heads)])


def canonical(truth: torch.Tensor, block: BlockLayout) -> bytes:
    """``[kv][head][token][layer][dim]``, which for a latent is ``[token][layer][dim]``."""
    return truth.reshape(-1).numpy().tobytes()


def test_a_page_that_is_not_the_wanted_share_is_refused() -> None:
    block = BlockLayout(tokens=4, layers=2, kv_heads=4, head_dim=8, itemsize=2)
    pool = MHATokenToKVPoolHost("page_first", block, 2, 3, torch.float16)
    with pytest.raises(IdentityError, match="are not the wanted"):
        CanonicalPages(pool, block, (0, 4))
    pages = CanonicalPages(pool, block, (2, 4))
    assert pages.places(torch.arange(4, 12), 2) == [1, 2]
    for wrong in (
        torch.arange(3, 11),
        torch.arange(4, 11),
        torch.arange(12, 20),
        torch.tensor([4, 5, 7, 6, 8, 9, 10, 11]),
    ):
        with pytest.raises(IdentityError):
            pages.places(wrong, 2)


def test_rope_reads_the_same_whatever_words_it_is_written_in() -> None:
    plain = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}, "hidden_size": 64}
    twice = {"rope_parameters": {**plain["rope_parameters"], "type": "yarn"}, "vocab_size": 1}  # type: ignore[dict-item]
    older = {"rope_parameters": {"rope_theta": 1e6, "type": "yarn", "factor": 4.0}}
    assert rope_text(plain) == rope_text(twice) == rope_text(older)
    assert rope_text(plain) != rope_text({"rope_parameters": {**plain["rope_parameters"], "factor": 8.0}})  # type: ignore[dict-item]
    assert rope_text({"hidden_size": 64}) == rope_text({"rope_parameters": None}) == ""
