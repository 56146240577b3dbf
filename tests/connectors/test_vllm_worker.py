"""The worker's side under a node that is slow, gone or full: the engine never waits long, and nothing is lost or leaked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import connectors.vllm.saves as saves
import connectors.vllm.worker as worker
from connectors.link import Link
from connectors.paging.base import ABSENT, Pager
from connectors.paging.torch import Finished, OpaquePager
from connectors.vllm.groups import PageTables
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Load, Save
from connectors.weights import weights_digest
from kvstore.errors import NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import Miss, NewBlock
from kvstore.testing.inprocess import InProcessNode

PAGES = 64
NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=1,
    layout="opaque:test",
)  # fmt: skip
GEOMETRY = Geometry(NAMESPACE, 1, 1, 64)


class SlowNode(InProcessNode):
    """Answers a call of the given name only when ``go`` is set."""

    def __init__(self, *slow: str) -> None:
        super().__init__(1 << 20)
        self.go = threading.Event()
        for name in slow:
            setattr(self, name, self.behind(getattr(self, name)))

    def behind(self, call: Any) -> Any:
        def wait(*args: Any, **kwargs: Any) -> Any:
            self.go.wait(30)
            return call(*args, **kwargs)

        return wait


class Rig:
    """A mover with its memory."""

    def __init__(self, node: InProcessNode, load_timeout: float = 5.0, pager: Pager | None = None) -> None:
        self.node = node
        self.cache = torch.arange(PAGES * 64, dtype=torch.int64).to(torch.uint8).reshape(PAGES, 64)
        self.recorder = Recorder()
        self.link = Link(node, NAMESPACE, 64)
        while self.link.keyring is None:
            time.sleep(0.001)
        self.pager = pager or OpaquePager({"layer": self.cache}, PAGES, 1)
        self.mover = worker.Mover(self.link, self.pager, GEOMETRY, 0, self.recorder, load_timeout)

    def save(self, *pages: int) -> None:
        self.mover.begin_saves([Save(NewBlock(key(page), NO_PARENT, 0), (page,)) for page in pages])
        self.mover.finish_saves()

    def counted(self) -> dict[str, float]:
        stats = self.recorder.take()
        return stats.data if stats else {}


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, no save is dropped because its reservation came late."""
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)


@pytest.fixture
def rigs() -> Iterator[Any]:
    made: list[Rig] = []

    def make(node: InProcessNode, **options: Any) -> Rig:
        made.append(Rig(node, **options))
        return made[-1]

    yield make
    for rig in made:
        if isinstance(rig.node, SlowNode):
            rig.node.go.set()
        rig.mover.close()


def test_saved_pages_come_back(rigs: Any) -> None:
    rig = rigs(InProcessNode(1 << 20))
    rig.save(*range(40))
    wait(lambda: len(rig.node.keys) == 40)
    rig.mover.load(Load("r", tuple(key(page) for page in range(40)), tuple(range(63, 23, -1)), 0)).result()
    assert rig.mover.take_ended().received == {"r"}
    assert rig.mover.take_bad_pages() == set()
    assert all(torch.equal(rig.cache[63 - page], torch.arange(page * 64, page * 64 + 64) % 256) for page in range(24))


def test_a_late_reservation_is_given_up_and_its_slots_return(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs(SlowNode("reserve"))
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 0.05)
    rig.save(1)
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)
    assert rig.counted()["blocks_not_saved:late"] == 1
    assert rig.mover.take_told().dropped == {key(1)}
    rig.node.go.set()
    wait(lambda: rig.link.keyring)
    rig.save(2)
    wait(lambda: rig.node.keys == {key(2)})
    rig.save(1)  # its slot was not left reserved
    wait(lambda: rig.node.keys == {key(1), key(2)})


def test_a_node_that_hangs_is_waited_for_once(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs(SlowNode("reserve"))
    monkeypatch.setattr(rig.node, "open_namespace", rig.node.behind(rig.node.open_namespace))
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 0.05)
    rig.save(1)
    asked: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(rig.node, "reserve", lambda *args: asked.append(args))
        rig.save(2)
    assert not asked
    assert {name: count for name, count in rig.counted().items() if "not_saved" in name} == {
        "blocks_not_saved:late": 1,
        "blocks_not_saved:unavailable": 1,
    }
    assert rig.mover.take_told().dropped == {key(1), key(2)}
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)
    rig.node.go.set()
    wait(lambda: rig.link.keyring)
    rig.save(1, 2)
    wait(lambda: rig.node.keys == {key(1), key(2)})


def test_saves_beyond_the_bound_are_dropped(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "MAX_UNPUBLISHED", 2)
    rig = rigs(SlowNode("commit"))
    rig.save(1, 2)
    rig.save(3)
    assert rig.counted()["blocks_not_saved:busy"] == 1
    assert rig.mover.take_told().dropped == {key(3)}
    rig.node.go.set()
    wait(lambda: rig.node.keys == {key(1), key(2)})

    def saved() -> bool:
        rig.save(3)  # there is room again a moment after the others are published
        return key(3) in rig.node.keys

    wait(saved)


def test_a_load_ends_at_the_first_missing_block_and_releases_every_lease(
    rigs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOAD_CHUNK", 4)
    rig = rigs(InProcessNode(1 << 20))
    rig.save(*range(10), *range(11, 20))
    wait(lambda: len(rig.node.keys) == 19)
    rig.mover.load(Load("r", tuple(key(page) for page in range(20)), tuple(range(30, 50)), 0)).result()
    assert rig.mover.take_ended().received == {"r"}
    assert rig.mover.take_bad_pages() == set(range(40, 50))
    assert rig.counted()[f"blocks_missed:{Miss.NOT_STORED.value}"] == 10
    assert all(slot.leases == 0 for slot in rig.node._slots.values())


def test_a_load_that_takes_too_long_ends(rigs: Any) -> None:
    rig = rigs(InProcessNode(1 << 20), load_timeout=-1.0)
    rig.mover.load(Load("r", (key(1),), (5,), 0)).result()
    assert rig.mover.take_ended().received == {"r"}
    assert rig.mover.take_bad_pages() == {5}
    assert rig.counted()["blocks_missed:deadline"] == 1


class SlowTransfer:
    """A copy that runs until told to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.waited = False

    def done(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> None:
        self.waited = True
        self.ended.wait(30)


class SlowPager(Pager):
    block_bytes = 64

    def __init__(self) -> None:
        self.transfers: list[SlowTransfer] = []
        self.loads: list[Any] = []

    def save(self, arena: Any, copies: Any) -> SlowTransfer:
        self.transfers.append(SlowTransfer())
        return self.transfers[-1]

    def load(self, arena: Any, copies: Any) -> Finished:
        self.loads.append(list(copies))
        return Finished()

    def close(self) -> None:
        pass


def test_pages_are_protected_only_while_they_are_copied(rigs: Any) -> None:
    pager = SlowPager()
    rig = rigs(InProcessNode(1 << 20), pager=pager)
    wait(lambda: pager.loads == [[]])  # it was shown the arena before there was anything to copy
    rig.save(1, 2)
    rig.mover.protect(frozenset({3}))  # other pages: returns at once
    assert not rig.node.keys
    (transfer,) = pager.transfers
    threading.Timer(0.05, transfer.ended.set).start()
    rig.mover.protect(frozenset({2}))
    assert transfer.done()
    wait(lambda: rig.node.keys == {key(1), key(2)})


def test_the_link_starts_a_node_and_finds_it_again() -> None:
    node = InProcessNode(1 << 20)
    up = threading.Event()
    starts = []

    class Client:
        def open_namespace(self, *args: Any) -> Any:
            if not up.is_set():
                raise NodeUnavailable("none")
            return node.open_namespace(*args)

        def close(self) -> None:
            pass

    def start() -> None:
        starts.append(1)
        up.set()

    client: Any = Client()
    link = Link(client, NAMESPACE, 64, start)
    wait(lambda: link.keyring is not None)
    assert starts == [1]
    up.clear()
    link.lost()
    assert link.keyring is None or starts == [1, 1]
    wait(lambda: link.keyring is not None)
    assert starts == [1, 1]
    link.close()


def test_weights_are_told_apart(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    def folder(name: str, tensor: torch.Tensor) -> str:
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(4), "b": tensor}, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    base = torch.arange(5000.0)
    digest = weights_digest(folder("one", base))
    assert digest == weights_digest(folder("same", base.clone()))
    assert digest != weights_digest(folder("trained", base * 1.001))
    assert weights_digest(str(tmp_path)) is None
    (tmp_path / "one" / "model.safetensors").write_bytes(b"short")
    weights_digest.cache_clear()
    assert weights_digest(str(tmp_path / "one")) is None


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_a_load_of_window_layers_that_fails_names_its_request_and_no_page(
    rigs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM could not compute from the first bad page on: the windows before it were not loaded."""
    monkeypatch.setattr(worker, "LOAD_CHUNK", 4)
    rig = rigs(InProcessNode(1 << 20))
    rig.save(*range(10))
    wait(lambda: len(rig.node.keys) == 10)
    geometry = replace(GEOMETRY, tables=PageTables((16,), (1,)))
    mover = worker.Mover(rig.link, rig.pager, geometry, 0, rig.recorder, 5.0)
    pages = (*[ABSENT] * 6, *range(30, 34))
    mover.load(Load("good", tuple(key(page) for page in range(10)), pages, 0)).result()
    mover.load(Load("bad", tuple(key(page) for page in range(2, 12)), pages, 0)).result()
    ended = mover.take_ended()
    assert (ended.received, ended.failed) == ({"good", "bad"}, {"bad"})
    assert mover.take_bad_pages() == set()
    assert rig.counted()["bytes_loaded"] == 64 * (4 + 2)
    assert torch.equal(rig.cache[31], torch.arange(9 * 64, 10 * 64).to(torch.uint8))


def test_an_idle_step_does_not_wait_right_after_a_load_ended(rigs: Any) -> None:
    """With asynchronous scheduling the step that computes that request is not scheduled yet."""
    rig = rigs(SlowNode("acquire"))
    rig.save(1)
    wait(lambda: rig.node.keys == {key(1)})
    rig.node.go.set()
    rig.mover.load(Load("first", (key(1),), (5,), 0)).result()
    rig.node.go.clear()
    rig.mover.load(Load("second", (key(1),), (6,), 0))
    assert rig.mover.take_ended(30.0).received == {"first"}
    stuck = threading.Timer(20, rig.node.go.set)
    stuck.start()
    assert rig.mover.take_ended(30.0).received == set()
    stuck.cancel()
    rig.node.go.set()
    assert rig.mover.take_ended(30.0).received == {"second"}
