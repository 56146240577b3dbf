"""Loads within a step on a worker: there before the step computes, or bad in its results; never saved from when in doubt."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import connectors.vllm.saves as saves
import connectors.vllm.worker as worker
from connectors.link import Link
from connectors.paging.base import BlockCopy, Pager
from connectors.paging.torch import Finished, OpaquePager
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Load, Save, Slots, Told
from kvstore import tracing
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import NewBlock
from kvstore.node.arena import Arena
from kvstore.testing.inprocess import InProcessNode

PAGES = 32
NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=1,
    layout="opaque:test",
)  # fmt: skip
STORED = 8


class Arriving:
    """A copy that the device is still making."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.refused: Exception | None = None
        self.error: Exception | None = None
        self.preceded = False

    def done(self) -> bool:
        return self.arrived.is_set()

    def wait(self) -> None:
        self.arrived.wait(30)
        if self.error is not None:
            raise self.error

    def precede(self) -> None:
        if self.refused is not None:
            raise self.refused
        self.preceded = True


class DevicePager(Pager):
    """Its loads arrive when told to; its saves at once."""

    block_bytes = 64

    def __init__(self) -> None:
        self.next = Arriving()
        self.copies: list[Sequence[BlockCopy]] = []
        self.is_ready = True

    def save(self, arena: Any, copies: Sequence[BlockCopy]) -> Finished:
        return Finished()

    def load(self, arena: Any, copies: Sequence[BlockCopy]) -> Any:
        if not copies:
            return Finished()
        self.copies.append(copies)
        return self.next

    def ready(self, arena: Any) -> bool:
        return self.is_ready

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, pager: Pager, cache: torch.Tensor) -> None:
        self.node = InProcessNode(1 << 20)
        self.cache = cache
        self.recorder = Recorder()
        link = Link(self.node, NAMESPACE, 64)
        wait(lambda: link.keyring is not None)
        self.mover = worker.Mover(link, pager, Geometry(NAMESPACE, 1, 1, 64), 0, self.recorder, 5.0)
        self.save(*range(STORED))
        wait(lambda: len(self.node.keys) == STORED)
        wait(lambda: self.mover._in_step._arena is not None)
        self.recorder.take()

    def save(self, *pages: int) -> None:
        self.mover.begin_saves([Save(NewBlock(key(page), NO_PARENT, 0), (page,)) for page in pages])
        self.mover.finish_saves()

    def slots(self, first: int, count: int, epoch: int = 1) -> Slots:
        """Of stored blocks, as the scheduler's side holds them."""
        acquired = self.node.acquire([key(number) for number in range(first, first + count)], 0.0)
        return Slots(epoch, acquired.offsets, acquired.media)

    def load(self, name: str, first: int, pages: Sequence[int], **slots: Any) -> Load:
        keys = tuple(key(number) for number in range(first, first + len(pages)))
        return Load(name, keys, tuple(pages), 0, slots=self.slots(first, len(pages), **slots))

    def counted(self) -> dict[str, float]:
        stats = self.recorder.take()
        return stats.data if stats else {}


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, no save is dropped because its reservation came late."""
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)


def make(pager: Callable[[torch.Tensor], Pager]) -> Rig:
    cache = torch.arange(PAGES * 64, dtype=torch.int64).to(torch.uint8).reshape(PAGES, 64)
    return Rig(pager(cache), cache)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = make(lambda cache: OpaquePager({"layer": cache}, PAGES, 1))
    yield rig
    rig.mover.close()


@pytest.fixture
def pager() -> DevicePager:
    return DevicePager()


@pytest.fixture
def device(pager: DevicePager) -> Iterator[Rig]:
    rig = make(lambda _: pager)
    yield rig
    pager.next.arrived.set()
    rig.mover.close()


def test_blocks_of_all_requests_are_in_their_pages_when_the_step_computes(rig: Rig) -> None:
    assert rig.mover.take_told() == Told(ready=Counter({1: 1}))
    rig.mover.load_in_step([rig.load("a", 0, range(20, 23)), rig.load("b", 3, range(23, 25))])
    for number in range(5):
        assert torch.equal(rig.cache[20 + number], torch.arange(number * 64, number * 64 + 64).to(torch.uint8))
    assert rig.mover.take_bad_pages() == set()
    assert rig.mover.take_ended().received == set(), "vLLM does not wait for them"
    rig.mover._in_step.last.result(30)
    told = rig.mover.take_told()
    assert told is not None
    assert (told.in_step, told.failed, told.arrived, told.arrived_bytes) == (True, frozenset(), 1, 5 * 64)
    assert told.arrived_seconds > 0
    assert rig.mover.take_told() is None
    counted = rig.counted()
    assert (counted["tokens_loaded:host"], counted["bytes_loaded"]) == (5, 5 * 64)


def test_each_request_of_the_step_has_a_span_in_its_trace(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[str, str, Any]] = []

    @contextmanager
    def span(name: str, parent: str, **attributes: Any) -> Iterator[Any]:
        spans.append((name, parent, attributes["request"]))
        yield SimpleNamespace(set=lambda **_: None)

    monkeypatch.setattr(tracing, "span", span)
    loads = [rig.load("a", 0, range(20, 23)), rig.load("b", 3, range(23, 25))]
    rig.mover.load_in_step([replace(load, traceparent=f"of {load.request_id}") for load in loads])
    rig.mover._in_step.last.result(30)
    assert spans == [("connector load", "of a", "a"), ("connector load", "of b", "b")]


def test_the_engine_is_not_kept_and_its_device_waits(device: Rig, pager: DevicePager) -> None:
    device.mover.load_in_step([device.load("a", 0, range(20, 23))])
    assert pager.next.preceded
    assert device.mover.take_bad_pages() == set()
    told = device.mover.take_told()
    assert told is not None
    assert (told.in_step, told.arrived) == (True, 0), "the step's results may come before the bytes were counted"
    pager.next.arrived.set()
    device.mover._in_step.last.result(30)
    assert device.mover.take_told().arrived == 1


def test_a_load_that_is_refused_is_bad_in_the_same_step_and_not_saved_from(device: Rig, pager: DevicePager) -> None:
    pager.next.refused = RuntimeError("no such stream")
    threading.Timer(0.05, pager.next.arrived.set).start()
    device.mover.begin_saves([Save(NewBlock(key(20), NO_PARENT, 0), (20,))])
    device.mover.load_in_step([device.load("a", 0, range(20, 23)), device.load("b", 3, [9])])
    device.mover.finish_saves()
    assert pager.next.done(), "nothing writes to pages that are computed again"
    assert device.mover.take_bad_pages() == {20, 21, 22, 9}
    assert device.mover.take_told().failed == {"a", "b"}
    counted = device.counted()
    assert counted["blocks_missed:unavailable"] == 4
    assert counted["blocks_not_saved:load_failed"] == 1
    device.mover.load_in_step([])
    device.save(21)  # scheduled before the failure was known
    assert device.counted()["blocks_not_saved:load_failed"] == 1
    device.mover.load_in_step([])

    def saved() -> bool:
        device.save(20, 22)  # the slot is given back in a moment
        return {key(20), key(22)} <= device.node.keys

    wait(saved)
    assert key(21) not in device.node.keys


def test_slots_of_another_run_of_the_node_are_not_read(rig: Rig) -> None:
    before = rig.cache.clone()
    rig.mover.load_in_step([rig.load("a", 0, range(20, 23), epoch=2)])
    assert rig.mover.take_bad_pages() == {20, 21, 22}
    assert torch.equal(rig.cache, before)


def test_what_was_computed_with_a_copy_that_failed_is_never_saved(device: Rig, pager: DevicePager) -> None:
    device.mover.begin_saves([Save(NewBlock(key(20), NO_PARENT, 0), (20,))])
    device.mover.load_in_step([device.load("a", 0, range(20, 23))])
    device.mover.finish_saves()
    assert device.mover.take_bad_pages() == set()
    pager.next.error = RuntimeError("the bus")
    pager.next.arrived.set()
    wait(lambda: not device.mover._in_step.saving)
    device.mover._in_step.last.result(30)
    assert device.mover.take_told().failed == {"a"}
    device.mover.load_in_step([])
    device.save(21)
    device.mover._savers[0]._publishes.submit(lambda: None).result(30)
    assert not {key(20), key(21)} & device.node.keys
    counted = device.counted()
    assert counted["blocks_missed:unavailable"] == 3
    assert counted["blocks_not_saved:unpublished"] == 1
    assert counted["blocks_not_saved:load_failed"] == 1


def test_the_arena_of_a_node_that_is_gone_is_freed_before_the_next_step(rig: Rig) -> None:
    """Freeing a large one takes seconds, which no step may pay."""
    mover = rig.mover
    old, new = Arena.create(1 << 20, 2), Arena.create(1 << 20, 3)
    freed = weakref.ref(old)
    mover._in_step.prepared(old)
    assert mover.take_told() == Told(ready=Counter({2: 1}))
    mover._in_step.prepared(new)
    del old
    assert freed() is None
    assert mover.take_told() == Told(ready=Counter({3: 1}))


def test_an_arena_that_is_still_being_prepared_is_not_told(pager: DevicePager) -> None:
    pager.is_ready = False
    rig = make(lambda _: pager)
    assert rig.mover.take_told() is None
    pager.is_ready = True
    assert rig.mover.take_told() == Told(ready=Counter({1: 1}))
    rig.mover.close()
