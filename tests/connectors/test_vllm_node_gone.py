"""An engine whose node goes away for good, or comes back: its worker keeps no memory of the one that is gone."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from connectors.link import Link
from connectors.paging.torch import OpaquePager
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Told
from connectors.vllm.worker import Mover
from kvstore.identity import Namespace
from kvstore.node.client import Client
from kvstore.testing.node import RunningNode, wait_for

NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=1,
    layout="opaque:test",
)  # fmt: skip
PAGES = 8


def told(mover: Mover) -> list[Told]:
    """What it tells with the next step, if anything."""
    return [said] if (said := mover.take_told()) is not None else []


def test_a_gone_nodes_arena_is_freed_and_the_next_ones_is_prepared(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        client = Client(node.socket, connect_timeout=5.0)
        link = Link(client, NAMESPACE, 64)
        pager = OpaquePager({"layer": torch.zeros(PAGES, 64, dtype=torch.uint8)}, PAGES, 1)
        mover = Mover(link, pager, Geometry(NAMESPACE, 1, 1, 64), 0, Recorder(), 5.0)
        first: list[Told] = []
        wait_for(lambda: first.extend(told(mover)) or first)
        freed = weakref.ref(client.arena)
    wait_for(lambda: freed() is None)
    with RunningNode(tmp_path):
        second: list[Told] = []
        wait_for(lambda: second.extend(told(mover)) or second)
        assert second[0].ready.keys() == {client.epoch} != first[0].ready.keys()
        mover.close()
