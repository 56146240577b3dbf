"""The CUDA pager against the torch reference, on a GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paging_cases import Case, cases, check_hybrid, engine_bytes, random_fill

from connectors.paging.base import BlockCopy
from connectors.paging.reference import ReferencePager
from kvstore.errors import IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

pytest.importorskip("cupy", reason="CuPy is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from connectors.paging import batchcopy, pinned, routes
from connectors.paging.cuda import CudaPager

pytestmark = pytest.mark.gpu

LLAMA = BlockLayout(tokens=64, layers=32, kv_heads=8, head_dim=128, itemsize=2)
"""8 MiB a block."""


@pytest.fixture(params=["staged", "one_by_one", "direct"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way, in groups so small and slices so short that buffers are used again and copies are cut."""
    name: str = request.param
    monkeypatch.setattr(routes, "DIRECT_BELOW", 1 << 40 if name == "direct" else 0)
    if name == "one_by_one":  # as with a driver that knows no batches
        monkeypatch.setattr(batchcopy, "_batch", None)
    monkeypatch.setattr(routes, "STAGING_BYTES", 20_000)
    monkeypatch.setattr(routes, "WINDOW_BYTES", 50_000)
    monkeypatch.setattr(pinned, "SLICE_BYTES", 12 << 10)
    return name


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 2**32))
def test_equals_the_reference(route: str, arena: Arena, case: Case, seed: int) -> None:
    pages = random_fill(case.build("cuda"), seed)
    copies = case.copies(random.Random(seed))
    wanted = case.partial(random.Random(seed), copies)
    reference, pager = ReferencePager(pages, case.block, case.heads), CudaPager(pages, case.block, case.heads)
    try:
        arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
        reference.save(
            arena, copies
        ).wait()  # before the arena is pinned: torch's copies may not pass from slice to slice
        expected = bytes(arena.buffer)
        random_fill(pages, seed + 1)
        reference.load(arena, wanted).wait()
        loaded = engine_bytes(pages)

        arena.slot(0, arena.nbytes)[:] = bytes(arena.nbytes)
        random_fill(pages, seed)
        pager.save(arena, copies).wait()
        assert bytes(arena.buffer) == expected
        random_fill(pages, seed + 1)
        pager.load(arena, wanted).wait()
        assert torch.equal(engine_bytes(pages), loaded)
    finally:
        pager.close()


def test_a_hybrid_models_block(route: str, arena: Arena) -> None:
    check_hybrid(lambda *of: CudaPager(*of, sharers=2), "cuda", arena)


@pytest.mark.parametrize("heads", [(0, 8), (5, 6)])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLNHC", "BHLNC", "sglang"])
def test_pages_of_a_model_come_back_bit_identical(layout: str, heads: tuple[int, int]) -> None:
    case = Case(LLAMA, heads, torch.bfloat16, layout, page_tokens=16, pages=300)
    source, sink = random_fill(case.build("cuda"), 1), random_fill(case.build("cuda"), 2)
    slot = LLAMA.nbytes + 4096
    arena = Arena.create(32 * slot, epoch=1)
    order = random.Random(3).sample(range(case.pages), 2 * 32 * 4)
    gone = [BlockCopy(tuple(order[i * 4 : i * 4 + 4]), i * slot + 4096) for i in range(32)]
    back = [BlockCopy(tuple(order[128 + i * 4 : 128 + i * 4 + 4]), i * slot + 4096) for i in range(32)]
    saver, loader = CudaPager(source, LLAMA, heads), CudaPager(sink, LLAMA, heads)
    expected = engine_bytes(sink)
    expected[order[128:]] = engine_bytes(source)[order[:128]]

    saver.save(arena, gone).wait()
    loader.load(arena, back).wait()

    assert torch.equal(engine_bytes(sink), expected)
    saver.close()
    loader.close()
    arena.close()


def test_a_copy_follows_the_engines_work_that_was_enqueued_before_it(arena: Arena) -> None:
    case = Case(BlockLayout(4, 2, 2, 8, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=4, pages=2)
    pages = random_fill(case.build("cuda"), 1)
    pager = CudaPager(pages, case.block, case.heads)
    pager.save(arena, []).wait()

    torch.cuda._sleep(200_000_000)
    for half in pages.planes:
        for plane in half:
            plane.fill_(7)
    pager.save(arena, [BlockCopy((0,), 0)]).wait()
    assert set(torch.frombuffer(arena.slot(0, case.block.nbytes), dtype=torch.bfloat16).tolist()) == {7.0}

    torch.cuda._sleep(200_000_000)
    for half in pages.planes:
        for plane in half:
            plane.zero_()
    pager.load(arena, [BlockCopy((1,), 0)]).wait()
    assert all((plane[1] == 7).all() and (plane[0] == 0).all() for half in pages.planes for plane in half)
    pager.close()


def test_an_arena_is_pinned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's way of capturing refuses it to every thread, and is broken by it."""
    monkeypatch.setattr(pinned, "SLICE_BYTES", 1 << 20)
    case = Case(LLAMA, (0, 8), torch.bfloat16, "LBNHC", page_tokens=64, pages=4)
    pages = random_fill(case.build("cuda"), 1)
    pager = CudaPager(pages, LLAMA, (0, 8))
    arena = Arena.create(256 << 20, epoch=1)
    counter, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    with ThreadPoolExecutor(1) as link, torch.cuda.graph(graph):
        counter += 1
        link.submit(lambda: pager.load(arena, []).wait()).result()
        while not pager.ready(arena):
            time.sleep(0.001)
        counter += 1
    graph.replay()
    torch.cuda.synchronize()
    assert counter == 2
    pager.save(arena, [BlockCopy((0,), 0)]).wait()
    before = engine_bytes(pages)[0]
    pager.load(arena, [BlockCopy((1,), 0)]).wait()
    assert torch.equal(engine_bytes(pages)[1], before)
    pager.close()
    arena.close()


def test_a_token_is_not_held_up_by_a_save_beside_a_step() -> None:
    """A copy engine serves one stream until that has nothing left for it."""
    case = Case(LLAMA, (0, 8), torch.bfloat16, "LBNHC", page_tokens=64, pages=64)
    pager = CudaPager(random_fill(case.build("cuda"), 1), LLAMA, (0, 8))
    arena = Arena.create(1 << 30, epoch=1)
    copies = [BlockCopy((i,), i * LLAMA.nbytes) for i in range(64)] * 4  # 2 GiB: 40 ms of the bus
    pager.save(arena, copies[:64]).wait()
    token, host = torch.ones(8, dtype=torch.int64, device="cuda"), torch.zeros(8, dtype=torch.int64, pin_memory=True)
    tokens = torch.cuda.Stream()

    save = pager.save(arena, copies)
    torch.cuda._sleep(1_000_000_000)  # the next step
    time.sleep(0.005)
    with torch.cuda.stream(tokens):
        host.copy_(token, non_blocking=True)
    tokens.synchronize()

    assert host.tolist() == [1] * 8
    assert not save.done()
    save.wait()
    torch.cuda.synchronize()
    pager.close()
    arena.close()


def test_a_bad_batch_fails_alone(arena: Arena) -> None:
    case = Case(BlockLayout(4, 2, 2, 8, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=2, pages=4)
    pages = random_fill(case.build("cuda"), 1)
    pager = CudaPager(pages, case.block, case.heads)
    bad = pager.save(arena, [BlockCopy((0, 4), 0)])
    good = pager.save(arena, [BlockCopy((0, 1), 0)])
    with pytest.raises(IdentityError, match="not all inside"):
        bad.wait()
    good.wait()
    assert bad.done()
    assert good.done()
    pager.close()


def test_a_restarted_node_and_a_second_pager_share_registrations(arena: Arena) -> None:
    """One registration an arena and process, gone with its last user."""
    case = Case(BlockLayout(4, 2, 2, 8, 2), (0, 2), torch.bfloat16, "LBNHC", page_tokens=4, pages=2)
    one, two = (CudaPager(random_fill(case.build("cuda"), seed), case.block, case.heads) for seed in (1, 2))
    restarted = Arena.create(1 << 20, epoch=2)
    for pager in (one, two):
        pager.save(arena, [BlockCopy((0,), 0)]).wait()
    one.save(restarted, [BlockCopy((0,), 0)]).wait()
    two.load(arena, [BlockCopy((1,), 0)]).wait()
    one.close()
    two.close()
    again = CudaPager(case.build("cuda"), case.block, case.heads)
    for place in (arena, restarted):
        again.save(place, [BlockCopy((0,), 0)]).wait()
    again.close()
    restarted.close()
