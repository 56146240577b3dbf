"""The kernels' source, compiled as plain C++ and run thread by thread on the CPU, against the torch reference."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cupy_on_cpu import Launcher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import Case, cases, engine_bytes, random_fill

from connectors.paging import kernels
from connectors.paging.base import BlockCopy
from connectors.paging.geometry import PagedKV, Share, strides
from connectors.paging.reference import ReferencePager
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def compiled(pages: PagedKV, share: Share, folder: Path) -> Launcher:
    return Launcher(kernels.SOURCE, kernels.defines(pages, share), folder)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 2**32), grid=st.integers(1, 3))
def test_kernels_equal_the_reference(arena: Arena, tmp_path: Path, case: Case, seed: int, grid: int) -> None:
    pages = random_fill(case.build("cpu"), seed)
    share = Share.of(pages, case.block, case.heads)
    copies = case.copies(random.Random(seed))
    address = np.frombuffer(arena.buffer[:], np.uint8).ctypes.data
    first = address + case.heads[0] * strides(case.block).head
    payloads = [first + copy.offset for copy in copies]
    planes = torch.tensor(kernels.addresses(pages))
    vectors = len(copies) * share.nbytes // kernels.vector_bytes(pages)
    launch = compiled(pages, share, tmp_path)
    arguments = kernels.Arguments(planes.data_ptr(), strides(case.block))

    def run(forward: bool, copies: list[BlockCopy]) -> None:
        rows = pages.view_pages(copies, case.block.tokens)
        for begin, end in ((0, vectors // 3), (vectors // 3, vectors)):  # a launch may begin anywhere
            arguments.fill(np.array(payloads), rows, begin, end - begin)
            launch(forward, grid, 64, arguments.address)

    reference = ReferencePager(pages, case.block, case.heads)
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
    reference.save(arena, copies).wait()
    expected = bytes(arena.buffer)
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
    run(True, copies)
    assert bytes(arena.buffer) == expected

    random_fill(pages, seed + 1)
    before = engine_bytes(pages)
    wanted = case.partial(random.Random(seed), copies)
    reference.load(arena, wanted).wait()
    loaded = engine_bytes(pages)
    random_fill(pages, seed + 1)
    assert torch.equal(engine_bytes(pages), before)
    run(False, wanted)
    assert torch.equal(engine_bytes(pages), loaded)


def test_a_compact_share_is_the_runs_of_the_slot(arena: Arena, tmp_path: Path) -> None:
    """What a staging buffer holds is what the copies of the share's runs put together."""
    case = next(c for c in _some_cases() if c.block.kv == 2 and c.block.kv_heads > c.heads[1] - c.heads[0])
    pages = random_fill(case.build("cpu"), 1)
    share = Share.of(pages, case.block, case.heads)
    copy = case.one_copy()
    ReferencePager(pages, case.block, case.heads).save(arena, [copy]).wait()
    slot = bytes(arena.slot(copy.offset, case.block.nbytes))

    staging = np.zeros(share.nbytes, np.uint8)
    rows = pages.view_pages([copy], case.block.tokens)
    planes = torch.tensor(kernels.addresses(pages))
    arguments = kernels.Arguments(planes.data_ptr(), strides(share.compact))
    arguments.fill(np.array([staging.ctypes.data]), rows, 0, share.nbytes // kernels.vector_bytes(pages))
    compiled(pages, share, tmp_path)(True, 2, 64, arguments.address)
    assert staging.tobytes() == b"".join(slot[run.offset : run.offset + run.length] for run in share.runs)


@pytest.mark.parametrize(
    ("dim", "dtype", "width"), [(128, torch.bfloat16, 16), (20, torch.float16, 8), (3, torch.float8_e4m3fn, 1)]
)
def test_accesses_are_as_wide_as_alignment_allows(dim: int, dtype: torch.dtype, width: int) -> None:
    case = next(iter(_some_cases()))
    case = replace(case, dtype=dtype, block=replace(case.block, head_dim=dim, itemsize=dtype.itemsize))
    assert kernels.vector_bytes(case.build("cpu")) == width


def test_a_batch_fits_the_argument_space_of_a_kernel() -> None:
    assert kernels.BATCH.itemsize + 16 <= 4096


def _some_cases() -> list[Case]:
    block = BlockLayout(tokens=4, layers=3, kv_heads=4, head_dim=8, itemsize=2)
    return [Case(block, (1, 3), torch.bfloat16, layout, 2, 6) for layout in ("LBNHC", "BLHNC", "sglang")]
