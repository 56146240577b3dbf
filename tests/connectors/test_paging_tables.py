"""Pages of a hybrid model: layers that go by several page tables, and pages that the engine keeps no more."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cupy_on_cpu import Launcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import engine_bytes, random_fill

from connectors.paging import kernels
from connectors.paging.base import ABSENT, BlockCopy, Pager
from connectors.paging.geometry import PagedKV, Share, strides, vllm_pages
from connectors.paging.parted import Part, PartedPager
from connectors.paging.reference import ReferencePager
from connectors.paging.torch import OpaquePager
from kvstore.errors import IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

PAGES, PAGE, PER_BLOCK = 24, 2, 2
TABLES = (0, 1, 1, 2)
"""Of each layer."""
BLOCK = BlockLayout(tokens=PAGE * PER_BLOCK, layers=len(TABLES), kv_heads=2, head_dim=8, itemsize=2)
OFFSET = 4096


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


def caches(seed: int, layers: int = len(TABLES)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(PAGES, 2, PAGE, 16, generator=generator).bfloat16() for _ in range(layers)]


def views(caches: list[torch.Tensor], tables: tuple[int, ...] = TABLES) -> PagedKV:
    block = BlockLayout(BLOCK.tokens, len(caches), BLOCK.kv_heads, BLOCK.head_dim, BLOCK.itemsize)
    return vllm_pages(caches, block, PAGE, tables)


def rows(choice: random.Random, tables: int = 3) -> tuple[int, ...]:
    return tuple(choice.sample(range(PAGES), tables * PER_BLOCK))


@given(seed=st.integers(0, 2**32), tables=st.permutations(range(3)), lost=st.sets(st.integers(0, 5)))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_layer_goes_by_its_own_table(arena: Arena, seed: int, tables: list[int], lost: set[int]) -> None:
    choice = random.Random(seed)
    tables = [*tables, choice.randrange(3)]
    source, target = caches(1), caches(2)
    gone, come = rows(choice), rows(choice)
    come = tuple(ABSENT if place in lost else page for place, page in enumerate(come))
    ReferencePager(views(source, tuple(tables)), BLOCK, (0, 2)).save(arena, [BlockCopy(gone, OFFSET)]).wait()
    ReferencePager(views(target, tuple(tables)), BLOCK, (0, 2)).load(arena, [BlockCopy(come, OFFSET)]).wait()
    for layer, table in enumerate(tables):
        expected = caches(2)[layer]
        for place in range(table * PER_BLOCK, (table + 1) * PER_BLOCK):
            if come[place] != ABSENT:
                expected[come[place]] = source[layer][gone[place]]
        assert torch.equal(target[layer], expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_kernels_equal_the_reference(arena: Arena, tmp_path: Path) -> None:
    choice = random.Random(7)
    pages = random_fill(views(caches(1)), 1)
    share = Share.of(pages, BLOCK, (0, 2))
    launch = Launcher(kernels.SOURCE, kernels.defines(pages, share), tmp_path)
    directory = torch.tensor(kernels.directory(pages))
    address = np.frombuffer(arena.buffer[:], np.uint8).ctypes.data
    copies = [BlockCopy(rows(choice), OFFSET), BlockCopy(rows(choice), 2 * OFFSET)]

    def run(forward: bool, copies: list[BlockCopy]) -> None:
        arguments = kernels.Arguments(directory.data_ptr(), strides(BLOCK))
        payloads = np.array([address + copy.offset for copy in copies])
        vectors = len(copies) * share.nbytes // kernels.vector_bytes(pages)
        arguments.fill(payloads, pages.view_pages(copies, BLOCK.tokens), 0, vectors)
        launch(forward, 2, 64, arguments.address)

    reference = ReferencePager(pages, BLOCK, (0, 2))
    reference.save(arena, copies).wait()
    expected = bytes(arena.buffer)
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
    run(True, copies)
    assert bytes(arena.buffer) == expected

    some = [
        BlockCopy((*copies[0].pages[:2], ABSENT, ABSENT, ABSENT, 3), OFFSET),
        BlockCopy(copies[1].pages[::PER_BLOCK], 2 * OFFSET, first_page=1),
    ]
    random_fill(pages, 2)
    reference.load(arena, some).wait()
    loaded = engine_bytes(pages)
    random_fill(pages, 2)
    run(False, some)
    assert torch.equal(engine_bytes(pages), loaded)


def parted(caches: list[torch.Tensor]) -> Pager:
    """Layers 1 and 2 by tables 0 and 2, layers 0 and 3 by table 1."""

    def part(layers: tuple[int, ...], tables: tuple[int, ...]) -> ReferencePager:
        block = BlockLayout(BLOCK.tokens, len(layers), 2, 8, 2)
        return ReferencePager(views([caches[layer] for layer in layers], tables), block, (0, 2))

    return PartedPager([Part(part((0, 3), (0, 0)), (1,)), Part(part((1, 2), (0, 1)), (0, 2))])


def test_parts_of_a_block_lie_one_behind_the_other(arena: Arena) -> None:
    source, target = caches(1), caches(2)
    pager = parted(source)
    assert pager.block_bytes == BLOCK.nbytes
    pager.save(arena, [BlockCopy((0, 1, 2, 3, 4, 5), OFFSET)]).wait()
    first = ReferencePager(views([source[0], source[3]], ()), BlockLayout(BLOCK.tokens, 2, 2, 8, 2), (0, 2))
    first.save(arena, [BlockCopy((2, 3), 8 * OFFSET)]).wait()
    assert bytes(arena.slot(OFFSET, first.block_bytes)) == bytes(arena.slot(8 * OFFSET, first.block_bytes))

    parted(target).load(arena, [BlockCopy((ABSENT, ABSENT, 10, 11, ABSENT, ABSENT), OFFSET)]).wait()
    for layer in (0, 3):
        assert torch.equal(target[layer][10:12], source[layer][2:4])
    for layer in (1, 2):
        assert torch.equal(target[layer], caches(2)[layer])
    parted(target).load(arena, [BlockCopy((20, 21, 22), OFFSET, first_page=1)]).wait()
    assert torch.equal(target[1][20], source[1][1])
    assert torch.equal(target[0][21], source[0][3])
    assert torch.equal(target[2][22], source[2][5])


def test_a_part_that_fails_fails_the_transfer(arena: Arena) -> None:
    transfer = parted(caches(1)).load(arena, [BlockCopy((0, 1, 2, PAGES, 4, 5), OFFSET)])
    with pytest.raises(IdentityError, match="not all inside"):
        transfer.wait()


def test_opaque_pages_by_several_tables(arena: Arena) -> None:
    source = {f"layer{i}": cache for i, cache in enumerate(caches(1))}
    target = {f"layer{i}": cache for i, cache in enumerate(caches(2))}
    saver, loader = (OpaquePager(named, PAGES, PER_BLOCK, tables=TABLES) for named in (source, target))
    saver.save(arena, [BlockCopy((0, 1, 2, 3, 4, 5), OFFSET)]).wait()
    loader.load(arena, [BlockCopy((6, 7, ABSENT, 9, ABSENT, ABSENT), OFFSET)]).wait()
    assert torch.equal(target["layer0"][6:8], source["layer0"][0:2])
    for name in ("layer1", "layer2"):
        assert torch.equal(target[name][9], source[name][3])
        assert torch.equal(target[name][8], caches(2)[int(name[-1])][8])
    assert torch.equal(target["layer3"], caches(2)[3])
    with pytest.raises(ValueError, match="writes all"):
        saver.save(arena, [BlockCopy((0, 1, 2, 3, 4, ABSENT), OFFSET)])
