"""The CUDA pager's own logic (groups, buffers, slices, errors, registrations), with CuPy played by the CPU."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cupy_on_cpu
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import Case, cases, check_hybrid, engine_bytes, random_fill

from connectors.paging.base import BlockCopy
from connectors.paging.reference import ReferencePager
from kvstore.errors import ConfigError, IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena
from kvstore.testing.node import wait_for

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

OURS = ("batchcopy", "capture", "pinned", "routes", "cuda")
SMALL = Case(BlockLayout(4, 2, 2, 8, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=2, pages=4)


@pytest.fixture
def registry() -> Iterator[cupy_on_cpu.Registry]:
    registry = cupy_on_cpu.Registry()
    yield registry
    assert not registry.ranges, "an arena stayed registered"


@pytest.fixture(params=["staged", "direct"])
def cuda(
    request: pytest.FixtureRequest,
    registry: cupy_on_cpu.Registry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ModuleType]:
    """``connectors.paging.cuda``, in groups so small and slices so short that buffers are used again and copies are cut."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in cupy_on_cpu.modules(registry, tmp_path_factory.mktemp("kernels")).items():
            patch.setitem(sys.modules, name, module)
        for name in OURS:
            patch.delitem(sys.modules, f"connectors.paging.{name}", raising=False)
        loaded = {name: importlib.import_module(f"connectors.paging.{name}") for name in OURS}
        patch.setattr(loaded["batchcopy"], "_batch", None)
        patch.setattr(loaded["capture"], "_exchange", registry.capture.exchange)
        patch.setattr(loaded["routes"], "DIRECT_BELOW", 0 if request.param == "staged" else 1 << 40)
        patch.setattr(loaded["routes"], "STAGING_BYTES", 20_000)
        patch.setattr(loaded["routes"], "WINDOW_BYTES", 50_000)
        patch.setattr(loaded["pinned"], "SLICE_BYTES", 12 << 10)
        yield loaded["cuda"]
        for name in OURS:
            sys.modules.pop(f"connectors.paging.{name}", None)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 2**32))
def test_equals_the_reference(cuda: ModuleType, arena: Arena, case: Case, seed: int) -> None:
    pages = random_fill(case.build("cpu"), seed)
    copies = case.copies(random.Random(seed))
    wanted = case.partial(random.Random(seed), copies)
    reference, pager = ReferencePager(pages, case.block, case.heads), cuda.CudaPager(pages, case.block, case.heads)
    try:
        arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
        reference.save(arena, copies).wait()
        expected = bytes(arena.buffer)
        arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
        pager.save(arena, copies).wait()
        assert bytes(arena.buffer) == expected

        random_fill(pages, seed + 1)
        reference.load(arena, wanted).wait()
        loaded = engine_bytes(pages)
        random_fill(pages, seed + 1)
        pager.load(arena, wanted).wait()
        assert torch.equal(engine_bytes(pages), loaded)
    finally:
        pager.close()


def test_a_hybrid_models_block(cuda: ModuleType, arena: Arena) -> None:
    check_hybrid(lambda *of: cuda.CudaPager(*of, sharers=2), "cpu", arena)


def test_a_bad_batch_fails_alone(cuda: ModuleType, arena: Arena) -> None:
    pager = cuda.CudaPager(random_fill(SMALL.build("cpu"), 1), SMALL.block, SMALL.heads)
    bad, good = (pager.save(arena, [BlockCopy(pages, 0)]) for pages in ((0, 4), (0, 1)))
    with pytest.raises(IdentityError, match="not all inside"):
        bad.wait()
    good.wait()
    assert bad.done()
    assert good.done()
    pager.close()


@pytest.mark.parametrize("offset", [-16, 8, 1 << 20, (1 << 20) - SMALL.block.nbytes + 16])
def test_a_place_outside_the_arena_fails_the_transfer(cuda: ModuleType, arena: Arena, offset: int) -> None:
    pager = cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads)
    for move in (pager.save, pager.load):
        with pytest.raises(IdentityError, match="inside the arena"):
            move(arena, [BlockCopy((0, 1), offset)]).wait()
    pager.close()


def test_a_group_begins_and_ends_within_a_block(cuda: ModuleType, arena: Arena) -> None:
    """Blocks of 12 KiB through buffers of 20,000 bytes."""
    case = Case(BlockLayout(16, 6, 2, 16, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=4, pages=40)
    pages = random_fill(case.build("cpu"), 3)
    copies = [BlockCopy(tuple(range(at, at + 4)), 24 * 1024 * at // 4) for at in range(0, 40, 4)]
    pager = cuda.CudaPager(pages, case.block, case.heads)
    pager.save(arena, copies).wait()
    saved = bytes(arena.buffer)
    before = engine_bytes(pages)
    random_fill(pages, 4)
    pager.load(arena, copies).wait()
    pager.close()
    assert torch.equal(engine_bytes(pages), before)
    arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
    ReferencePager(pages, case.block, case.heads).save(arena, copies).wait()
    assert bytes(arena.buffer) == saved


def test_nothing_is_kept_of_the_arena_of_a_node_that_is_gone(cuda: ModuleType, registry: cupy_on_cpu.Registry) -> None:
    pager = cuda.CudaPager(random_fill(SMALL.build("cpu"), 1), SMALL.block, SMALL.heads)
    for epoch in (1, 2):
        arena = Arena.create(1 << 20, epoch)
        pager.save(arena, [BlockCopy((0, 1), 0)]).wait()
        pager.load(arena, [BlockCopy((2, 3), 0)]).wait()
        freed = weakref.ref(arena)
        del arena
        assert registry.ranges
        pager.forget()
        wait_for(lambda freed=freed: freed() is None and not registry.ranges)
    pager.close()


def test_copies_follow_the_engine_to_another_stream(
    cuda: ModuleType, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM changes its stream when it captures its first CUDA graph, after the caches were registered."""
    streams: list[int] = []
    pager = cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads)
    runtime = sys.modules["cupy.cuda.runtime"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(runtime, "eventRecord", lambda event, stream: streams.append(stream))
    monkeypatch.setattr(runtime, "streamWaitEvent", lambda stream, event: streams.append(stream))
    pager.save(arena, [BlockCopy((0, 1), 0)]).wait()
    pager.follow()
    pager.load(arena, [BlockCopy((2, 3), 0)]).precede()
    pager.close()
    assert streams == [0, 7, 7], "ordered behind the engine's work, and the engine's next work behind the load"


@pytest.mark.parametrize(("computing", "computed"), [(False, True), (True, True), (True, False)])
def test_saves_leave_room_for_an_engine_that_computes(
    cuda: ModuleType, arena: Arena, monkeypatch: pytest.MonkeyPatch, computing: bool, computed: bool
) -> None:
    """``computing`` now, and ``computed`` what the next save is of."""
    case = Case(BlockLayout(16, 6, 2, 16, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=4, pages=40)
    copies = [BlockCopy(tuple(range(at, at + 4)), 24 * 1024 * at // 4) for at in range(0, 40, 4)]
    pager = cuda.CudaPager(random_fill(case.build("cpu"), 3), case.block, case.heads)
    rests: list[float] = []
    saves: list[Any] = []
    another = False

    def rest(seconds: float) -> None:
        nonlocal another
        rests.append(seconds)
        if another:
            another = False
            saves.append(pager.save(arena, copies))

    monkeypatch.setattr(sys.modules["cupy.cuda.runtime"], "streamQuery", lambda stream: 600 * computing)
    monkeypatch.setattr(sys.modules["cupy.cuda"].Event, "done", computed)
    monkeypatch.setattr(cuda, "time", SimpleNamespace(perf_counter=iter(range(1000)).__next__, sleep=rest))
    monkeypatch.setattr(cuda, "SAVING_SHARE", 0.25)
    pager.load(arena, copies).wait()
    assert not rests, "a request waits for a load"
    pager.save(arena, copies).wait()
    assert set(rests) == ({3.0} if computing else set()), "a window of one second, then three without a save"
    alone, rests[:] = len(rests), []
    another = computing
    pager.save(arena, copies).wait()
    for save in saves:
        save.wait()
    pager.close()
    expected = 0 if not computing else 1 + alone if computed else 2 * alone
    assert len(rests) == expected, "none while another save could begin"


@pytest.mark.parametrize("computing", [False, True])
def test_only_an_idle_engine_is_saved_from_by_narrow_kernels(
    cuda: ModuleType, arena: Arena, monkeypatch: pytest.MonkeyPatch, computing: bool
) -> None:
    widths: list[int] = []
    driver = sys.modules["cupy.cuda.driver"]
    launch = driver.launchKernel
    monkeypatch.setattr(
        driver, "launchKernel", lambda kernel, grid, *rest: (widths.append(grid), launch(kernel, grid, *rest))
    )
    monkeypatch.setattr(sys.modules["cupy.cuda.runtime"], "streamQuery", lambda stream: 600 * computing)
    monkeypatch.setattr(sys.modules["connectors.paging.routes"], "DIRECT_BELOW", 0)
    monkeypatch.setattr(cuda, "IDLE_THREAD_BLOCKS", 1)
    case = Case(BlockLayout(16, 6, 2, 16, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=4, pages=4)
    pager = cuda.CudaPager(random_fill(case.build("cpu"), 3), case.block, case.heads)
    for move in (pager.save, pager.load):
        move(arena, [BlockCopy((0, 1, 2, 3), 0)]).wait()
    pager.close()
    assert widths == [2 if computing else 1, 2], "12 KiB, of which a thread block takes 8 at a time"


def test_it_says_when_an_arena_is_pinned(cuda: ModuleType, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    register = sys.modules["cupy.cuda.runtime"].hostRegister

    def slow(*arguments: int) -> None:
        go.wait(30)
        register(*arguments)

    monkeypatch.setattr(sys.modules["cupy.cuda.runtime"], "hostRegister", slow)
    pager = cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads)
    assert not pager.ready(arena)
    pager.load(arena, [])
    assert not pager.ready(arena)
    go.set()
    pager.load(arena, [BlockCopy((0, 1), (1 << 20) - 4096)]).wait()  # in the last slice
    assert pager.ready(arena)
    pager.close()


def test_pagers_share_a_registration_and_the_last_one_ends_it(
    cuda: ModuleType, arena: Arena, registry: cupy_on_cpu.Registry
) -> None:
    one, two = (cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads) for _ in range(2))
    restarted = Arena.create(1 << 20, epoch=2)
    for pager in (one, two):
        pager.save(arena, [BlockCopy((0, 1), 0)]).wait()
    one.save(restarted, [BlockCopy((0, 1), 0)]).wait()
    one.close()
    assert registry.ranges
    two.load(arena, [BlockCopy((2, 3), 0)]).wait()
    two.close()
    assert not registry.ranges
    restarted.close()


def test_an_arena_that_cannot_be_pinned_fails_the_transfer(
    cuda: ModuleType, arena: Arena, registry: cupy_on_cpu.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules["cupy.cuda.runtime"], "hostRegister", refuse)
    pager = cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads)
    with pytest.raises(ConfigError, match="cannot pin the arena: out of memory"):
        pager.save(arena, [BlockCopy((0, 1), 0)]).wait()
    pager.close()


def test_a_mismatch_of_cuda_versions_is_named(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ConfigError, match=r"built for CUDA 13\.0, torch for 12\.8\. Install cupy-cuda12x"):
        cuda.CudaPager(SMALL.build("cpu"), SMALL.block, SMALL.heads)
