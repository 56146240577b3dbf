"""How a link comes back to a node. No timed asserts: heartbeats are made so rare that none comes while a test runs."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import connectors.link
from connectors.link import Link
from kvstore.errors import DeadlineExceeded, KVStoreError, NodeUnavailable
from kvstore.identity import Keyring, Namespace
from kvstore.node.client import Client
from kvstore.testing.node import RunningNode, wait_for

NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layers=1, kv_heads=1, head_dim=8, attention="gqa", rope="none", block_tokens=16,
    layout="canonical:kv_head_token_layer", lora="",
)  # fmt: skip


@pytest.fixture(autouse=True)
def rare_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors.link, "HEARTBEAT_SECONDS", 3600.0)


class Answers:
    """A client whose node first fails in these ways."""

    epoch = 1

    def __init__(self, *failures: KVStoreError) -> None:
        self._failures = list(failures)

    def open_namespace(self, *_: Any) -> Keyring:
        if self._failures:
            raise self._failures.pop(0)
        return Keyring(bytes(32))

    def close(self) -> None:
        pass


def test_a_node_that_does_not_answer_is_tried_again_before_the_next_heartbeat() -> None:
    client: Any = Answers(NodeUnavailable("none"), DeadlineExceeded("late"), NodeUnavailable("lost"))
    link = Link(client, NAMESPACE, 64)
    wait_for(lambda: link.keyring is not None)
    link.close()


def test_nothing_is_kept_of_the_arena_of_a_node_that_is_gone(tmp_path: Path) -> None:
    """The next node may not have room for another one beside it."""
    gone = threading.Event()
    with RunningNode(tmp_path) as node:
        client = Client(node.socket, connect_timeout=5.0)
        link = Link(client, NAMESPACE, 64)
        link.on_node(lambda: None, gone.set)
        wait_for(lambda: link.keyring is not None)
        freed = weakref.ref(client.arena)
    link.lost()
    assert gone.wait(60)
    wait_for(lambda: freed() is None)
    link.close()


def test_who_kept_nothing_of_a_node_is_told_when_it_is_found_again(tmp_path: Path) -> None:
    """Also when it was the same run of it that did not answer for a while."""
    found: list[int] = []
    gone: list[bool] = []
    with RunningNode(tmp_path) as node:
        client = Client(node.socket, connect_timeout=5.0)
        link = Link(client, NAMESPACE, 64)
        link.on_node(lambda: found.append(client.epoch), lambda: gone.append(True))
        wait_for(lambda: len(found) == 1)
        node.socket.rename(tmp_path / "away")
        client.close()
        link.lost()
        wait_for(lambda: gone)
        (tmp_path / "away").rename(node.socket)
        wait_for(lambda: len(found) == 2)
        link.close()
    assert found[0] == found[1]


def test_a_node_that_returns_is_found_before_the_next_heartbeat(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        client = Client(node.socket, connect_timeout=5.0)
        link = Link(client, NAMESPACE, 64)
        wait_for(lambda: link.keyring is not None)
    assert link.keyring is not None
    with pytest.raises(KVStoreError):
        client.lookup(link.keyring.block_keys([bytes(32)]), timeout=5.0)
    link.lost()
    with RunningNode(tmp_path):
        wait_for(lambda: link.keyring is not None)
        assert client.lookup(link.keyring.block_keys([bytes(32)]), timeout=5.0).blocks == 0
        link.close()
