"""Opaque paging of host memory: whole pages, every stride, every rank's share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.paging.base import BlockCopy
from connectors.paging.torch import OpaquePager, page_rows
from kvstore.errors import ConfigError
from kvstore.node.arena import Arena

PAGES = 6
SHAPE = (PAGES, 2, 4, 3)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


def caches(seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(SHAPE, generator=generator).to(dtype) for i in range(layers)}


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same pages with the head axis inside the token axis, and every layer in one tensor: strides of another layout."""
    whole = torch.zeros(PAGES, 2, 4, 2, 3, dtype=values.dtype)  # [page, layer, token, head, dim]
    view = whole[:, 1].permute(0, 2, 1, 3)
    view.copy_(values)
    return view


@given(st.permutations(range(PAGES)), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(1, 3))
@settings(max_examples=30)
def test_what_is_saved_is_loaded(order: list[int], dtype: torch.dtype, per_block: int) -> None:
    arena = Arena.create(1 << 20, epoch=1)
    source, target = caches(1, dtype=dtype), caches(2, dtype=dtype)
    blocks = [tuple(order[at : at + per_block]) for at in range(0, PAGES - per_block + 1, per_block)]
    saver, loader = (OpaquePager(c, PAGES, per_block) for c in (source, target))
    offsets = [4096 + index * saver.block_bytes for index in range(len(blocks))]
    saver.save(arena, [BlockCopy(b, at) for b, at in zip(blocks, offsets, strict=True)]).wait()
    mirrored = [tuple(PAGES - 1 - page for page in block) for block in blocks]
    untouched = set(range(PAGES)) - {page for block in mirrored for page in block}
    before = {name: cache.clone() for name, cache in target.items()}
    loader.load(arena, [BlockCopy(b, at) for b, at in zip(mirrored, offsets, strict=True)]).wait()
    for name in source:
        for block, mirror in zip(blocks, mirrored, strict=True):
            for page, other in zip(block, mirror, strict=True):
                assert torch.equal(source[name][page], target[name][other])
        for page in untouched:
            assert torch.equal(before[name][page], target[name][page])
    arena.close()


def test_ranks_write_disjoint_shares_that_make_the_block(arena: Arena) -> None:
    ranks = [OpaquePager(caches(seed), PAGES, 2, rank, 2) for rank, seed in enumerate((1, 2))]
    size = ranks[0].block_bytes
    arena.buffer[0:size] = bytes(size)
    for pager in ranks:
        pager.save(arena, [BlockCopy((4, 1), 0)])
    loaded = [caches(9), caches(9)]
    for rank, target in enumerate(loaded):
        OpaquePager(target, PAGES, 2, rank, 2).load(arena, [BlockCopy((0, 5), 0)])
        for name, cache in caches(rank + 1).items():
            assert torch.equal(target[name][0], cache[4])
            assert torch.equal(target[name][5], cache[1])


def test_part_of_a_block(arena: Arena) -> None:
    source, target = caches(1), caches(2)
    OpaquePager(source, PAGES, 3).save(arena, [BlockCopy((0, 1, 2), 8192)])
    OpaquePager(target, PAGES, 3).load(
        arena, [BlockCopy((5,), 8192, first_page=1), BlockCopy((3,), 8192, first_page=2)]
    )
    for name in source:
        assert torch.equal(target[name][5], source[name][1])
        assert torch.equal(target[name][3], source[name][2])
        assert torch.equal(target[name][4], caches(2)[name][4])


def test_strided_pages_hold_the_same_values(arena: Arena) -> None:
    source = {name: strided(cache) for name, cache in caches(1).items()}
    target = {name: strided(cache) for name, cache in caches(2).items()}
    OpaquePager(source, PAGES, 1).save(arena, [BlockCopy((2,), 0)])
    OpaquePager(target, PAGES, 1).load(arena, [BlockCopy((4,), 0)])
    for name in source:
        assert torch.equal(target[name][4], source[name][2])
        assert torch.equal(target[name][3], strided(caches(2)[name])[3])


def test_a_page_may_be_several_rows_of_the_tensor() -> None:
    rows = page_rows("layer", torch.arange(24, dtype=torch.uint8).reshape(6, 4), pages=3)
    assert rows.tolist() == [list(range(8)), list(range(8, 16)), list(range(16, 24))]


def test_pages_that_are_not_one_run_are_refused() -> None:
    heads_outside = torch.zeros(2, PAGES, 4).permute(1, 0, 2)
    with pytest.raises(ConfigError, match="not contiguous"):
        page_rows("layer", heads_outside, PAGES)
    with pytest.raises(ConfigError, match="does not hold"):
        page_rows("layer", torch.zeros(5, 4), PAGES)


def test_a_save_takes_whole_blocks(arena: Arena) -> None:
    pager = OpaquePager(caches(), PAGES, 2)
    with pytest.raises(ValueError, match="all 2 pages"):
        pager.save(arena, [BlockCopy((1,), 0)])
