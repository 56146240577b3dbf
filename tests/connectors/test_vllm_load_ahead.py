"""A load keeps the bus busy: its next blocks are handed to the pager before the last ones have arrived."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

import connectors.vllm.saves as saves
import connectors.vllm.worker as worker
from connectors.link import Link
from connectors.paging.base import BlockCopy, Pager
from connectors.paging.torch import Finished
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Load, Save
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import NewBlock
from kvstore.testing.inprocess import InProcessNode

NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=1,
    layout="opaque:test",
)  # fmt: skip
KEYS = tuple(BlockKey(number.to_bytes(16, "big")) for number in range(8))
CHUNK = 2


class Arriving:
    """A copy that arrives, or fails, when told to."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.error: Exception | None = None

    def tell(self, error: Exception | None = None) -> None:
        self.error = error
        self.told.set()

    def done(self) -> bool:
        return self.told.is_set()

    def wait(self) -> None:
        self.told.wait(30)
        if self.error is not None:
            raise self.error


class HeldPager(Pager):
    block_bytes = 64

    def __init__(self) -> None:
        self.loads: list[Arriving] = []

    def save(self, arena: Any, copies: Sequence[BlockCopy]) -> Finished:
        return Finished()

    def load(self, arena: Any, copies: Sequence[BlockCopy]) -> Any:
        if not copies:
            return Finished()
        self.loads.append(Arriving())
        return self.loads[-1]

    def close(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.node = InProcessNode(1 << 20)
        link = Link(self.node, NAMESPACE, 64)
        wait(lambda: link.keyring is not None)
        self.pager = HeldPager()
        self.mover = worker.Mover(link, self.pager, Geometry(NAMESPACE, 1, 1, 64), 0, Recorder(), 30.0)
        self.mover.begin_saves([Save(NewBlock(key, NO_PARENT, 0), (0,)) for key in KEYS])
        self.mover.finish_saves()
        wait(lambda: len(self.node.keys) == len(KEYS))

    def leases(self) -> int:
        return sum(slot.leases for slot in self.node._slots.values())


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(worker, "LOAD_CHUNK", CHUNK)
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)
    rig = Rig()
    yield rig
    for copy in rig.pager.loads:
        copy.tell()
    rig.mover.close()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def load(rig: Rig) -> Any:
    return rig.mover.load(Load("r", KEYS, tuple(range(len(KEYS))), 0))


def test_two_copies_are_under_way_and_the_third_waits_for_the_first(rig: Rig) -> None:
    ended = load(rig)
    for number in range(len(KEYS) // CHUNK):
        wait(lambda number=number: len(rig.pager.loads) >= min(number + 2, len(KEYS) // CHUNK))
        assert len(rig.pager.loads) <= number + 2
        rig.pager.loads[number].tell()
    ended.result(30)
    assert rig.mover.take_ended().received == {"r"}
    assert not rig.mover.take_bad_pages()
    assert not rig.leases()


def test_a_failed_copy_ends_the_load_when_the_one_behind_it_has_ended(rig: Rig) -> None:
    ended = load(rig)
    wait(lambda: len(rig.pager.loads) == 2)
    first, second = rig.pager.loads
    first.tell(RuntimeError("the copy failed"))
    wait(lambda: rig.leases() == CHUNK)
    assert not ended.done(), "pages and slots are still in use"
    second.tell()
    ended.result(30)
    assert rig.mover.take_ended().received == {"r"}
    assert rig.mover.take_bad_pages() == set(range(len(KEYS)))
    assert not rig.leases()
