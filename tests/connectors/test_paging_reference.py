"""The torch reference against an element-by-element definition of the canonical layout."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import Case, cases, engine_bytes, random_fill

from connectors.paging.base import ABSENT, BlockCopy
from connectors.paging.geometry import PagedKV, Share, sglang_pages, vllm_pages
from connectors.paging.reference import ReferencePager
from kvstore.errors import IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

BLOCK = BlockLayout(tokens=4, layers=2, kv_heads=2, head_dim=8, itemsize=2)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


def stored_bytes(case: Case, pages: PagedKV, copy: BlockCopy) -> dict[int, int]:
    """Byte offset in the block -> byte, by the definition of the layout alone."""
    block, out = case.block, {}
    rows = pages.view_pages([copy], block.tokens)[0].tolist()
    for kv, planes in enumerate(pages.planes):
        for layer, plane in enumerate(planes):
            for token in range(block.tokens):
                page, slot = rows[token // pages.page_tokens], token % pages.page_tokens
                for local in range(pages.heads):
                    head = case.heads[0] + local
                    (run,) = block.runs(
                        heads=(head, head + 1), layers=(layer, layer + 1), tokens=(token, token + 1), kv=(kv, kv + 1)
                    )
                    row = plane[page, slot, local].view(torch.uint8).tolist()
                    out.update(zip(range(run.offset, run.offset + run.length), row, strict=True))
    return out


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 2**32))
def test_save_puts_every_element_where_the_layout_says(arena: Arena, case: Case, seed: int) -> None:
    pages = random_fill(case.build("cpu"), seed)
    pager = ReferencePager(pages, case.block, case.heads)
    copies = case.copies(random.Random(seed))
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)

    pager.save(arena, copies).wait()

    expected = bytearray(arena.nbytes)
    for copy in copies:
        for offset, byte in stored_bytes(case, pages, copy).items():
            expected[copy.offset + offset] = byte
    assert bytes(arena.buffer) == bytes(expected)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 2**32))
def test_load_returns_the_pages_asked_for_and_touches_no_other(arena: Arena, case: Case, seed: int) -> None:
    pages = random_fill(case.build("cpu"), seed)
    pager = ReferencePager(pages, case.block, case.heads)
    copies = case.copies(random.Random(seed))
    before = engine_bytes(pages)
    pager.save(arena, copies).wait()

    random_fill(pages, seed + 1)
    after = engine_bytes(pages)
    wanted = case.partial(random.Random(seed), copies)
    pager.load(arena, wanted).wait()

    for row in pages.view_pages(wanted, case.block.tokens):
        there = [page for page in row.tolist() if page != ABSENT]
        after[there] = before[there]
    assert torch.equal(engine_bytes(pages), after)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 2**32))
def test_a_block_passes_between_engines_of_different_layout(arena: Arena, case: Case, seed: int) -> None:
    """What one layout and page size saved, another loads."""
    source = random_fill(case.build("cpu"), seed)
    other = case.relaid()
    sink = other.build("cpu")
    ReferencePager(source, case.block, case.heads).save(arena, [case.one_copy()]).wait()
    ReferencePager(sink, case.block, case.heads).load(arena, [other.one_copy()]).wait()

    tokens = case.block.tokens
    for ours, theirs in zip(source.planes, sink.planes, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.flatten(0, 1)[:tokens].view(torch.uint8), b.flatten(0, 1)[:tokens].view(torch.uint8))


def test_ranks_together_write_what_one_engine_with_all_heads_writes(arena: Arena) -> None:
    whole = random_fill(vllm_pages([torch.empty(6, 2, 4, 16, dtype=torch.bfloat16) for _ in range(2)], BLOCK, 4), 7)
    copy = BlockCopy((3,), 0)
    ReferencePager(whole, BLOCK, (0, 2)).save(arena, [copy]).wait()
    expected = bytes(arena.slot(0, BLOCK.nbytes))

    arena.slot(0, BLOCK.nbytes)[:] = bytes(BLOCK.nbytes)
    for head in range(2):
        part = PagedKV(tuple(tuple(plane[:, :, head : head + 1] for plane in half) for half in whole.planes))
        ReferencePager(part, BLOCK, (head, head + 1)).save(arena, [copy]).wait()
    assert bytes(arena.slot(0, BLOCK.nbytes)) == expected


def test_a_share_is_its_runs_back_to_back() -> None:
    share = Share(BLOCK, (1, 2))
    assert sum(run.length for run in share.runs) == share.nbytes == BLOCK.nbytes // 2
    assert len(share.runs) == 2


@pytest.mark.parametrize(
    ("pages", "why"),
    [((1,), "pages 0:1 given of a block of 2"), ((0, 3), "not all inside"), ((-1, 0), "not all inside")],
)
def test_a_wrong_page_fails_the_transfer_and_does_not_raise(arena: Arena, pages: tuple[int, ...], why: str) -> None:
    cache = [torch.zeros(3, 2, 2, 16, dtype=torch.float16) for _ in range(2)]
    transfer = ReferencePager(vllm_pages(cache, BLOCK, 2), BLOCK, (0, 2)).save(arena, [BlockCopy(pages, 0)])
    assert transfer.done()
    with pytest.raises(IdentityError, match=why):
        transfer.wait()


def test_caches_that_cannot_hold_the_blocks_are_refused() -> None:
    def cache(*shape: int) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=torch.float16) for _ in range(2)]

    with pytest.raises(IdentityError, match="does not hold"):
        vllm_pages(cache(3, 2, 2, 24), BLOCK, 2)
    with pytest.raises(IdentityError, match="cannot hold pages of 3"):
        vllm_pages(cache(3, 2, 2, 16), BLOCK, 3)
    with pytest.raises(IdentityError, match="differ"):
        vllm_pages([*cache(3, 2, 2, 16)[:1], *cache(4, 2, 2, 16)[:1]], BLOCK, 2)
    with pytest.raises(IdentityError, match="cannot hold a share"):
        ReferencePager(vllm_pages(cache(3, 1, 2, 16), BLOCK, 2), BLOCK, (0, 2))
    with pytest.raises(IdentityError, match="not made of pages of 3"):
        ReferencePager(vllm_pages(cache(3, 2, 3, 16), BLOCK, 3), BLOCK, (0, 2))
    with pytest.raises(IdentityError, match="contiguous dim"):
        sglang_pages([tensor.mT for tensor in cache(4, 2, 8)], None, 2)
