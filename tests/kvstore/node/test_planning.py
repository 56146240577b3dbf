"""A node plans by what engines report and what its own tiers do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.errors import ProtocolError
from kvstore.identity import BlockKey, Namespace
from kvstore.node.api import NewBlock, Report
from kvstore.policy.planner import Reason
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.base import Medium

NAMESPACE = Namespace(
    model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=64,
    layout="opaque:test",
)  # fmt: skip
SIZE = 64 << 10


def keys(count: int, seed: int = 1) -> list[BlockKey]:
    rng = random.Random(seed)
    return [BlockKey(rng.randbytes(16)) for _ in range(count)]


def save(client: PatientClient, chain: list[BlockKey]) -> None:
    client.open_namespace(NAMESPACE, SIZE)
    parents = [BlockKey(bytes(16)), *chain]
    reserved = client.reserve(NAMESPACE, [NewBlock(*b) for b in zip(chain, parents, range(len(chain)), strict=False)])
    for offset in reserved.offsets:
        assert offset is not None
        reserved.arena.buffer[offset : offset + SIZE] = bytes(SIZE)
    assert len(client.commit(chain, durable=Medium.DISK)) == len(chain)


def test_speeds_that_are_reported_decide_and_are_counted(tmp_path: Path) -> None:
    chain = keys(8)
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        save(client, chain)
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        client.open_namespace(NAMESPACE, SIZE)
        assert client.lookup(chain).plan is None, "nobody asked for one"
        first = client.lookup(chain, waiting=0).plan
        assert first is not None
        assert (first.blocks, first.reason) == (8, Reason.UNMEASURED)
        assert first.patience.seconds(8) == pytest.approx(1 + 0.25 * 8 * 64 / 1024)
        acquired = client.acquire(chain[:2], 50)
        assert set(acquired.media) == {Medium.DISK}
        client.report(Report(steps=[(64, 2048.0, 1e-7)] * 5))
        wait_for(lambda: client.call("planner")["engines"][0]["prefill"]["steps"] == 5)
        fast = client.lookup(chain, waiting=0).plan
        assert fast is not None
        assert fast.reason in (Reason.RECOMPUTE, Reason.SPLIT)
        assert fast.blocks < 8
        client.report(Report(steps=[(64, 2048.0, 10.0)] * 20))
        wait_for(lambda: client.call("planner")["engines"][0]["prefill"]["steps"] == 25)
        slow = client.lookup(chain, waiting=0).plan
        assert slow is not None
        assert (slow.blocks, slow.reason) == (8, Reason.LOAD)
        counters = client.call("status")["counters"]
        assert counters["kvstore_planned_requests_total{reason=load}"] == 1
        assert counters["kvstore_planned_blocks_total{plan=load,reason=unmeasured}"] == 8


@pytest.mark.parametrize(
    "arguments",
    [{"steps": 1}, {"steps": [[1, 2]]}, {"steps": [[1, -1, 1]]}, {"loads": [["a", 1]]}, {"loads": [[1, 1]] * 5000}],
)
def test_a_report_that_cannot_be_is_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    with (
        RunningNode(tmp_path) as node,
        PatientClient(node.socket) as client,
        pytest.raises(ProtocolError, match="rows"),
    ):
        client.call("report", **arguments)


def test_speeds_are_known_over_a_restart(tmp_path: Path) -> None:
    chain = keys(8)
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        save(client, chain)
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        client.open_namespace(NAMESPACE, SIZE)
        assert client.acquire(chain, 50).miss is None
        client.report(Report(steps=[(64, 2048.0, 1e-7)] * 5))
        wait_for(lambda: client.call("planner")["engines"])
        learnt = client.call("planner")
        assert learnt["tiers"]["disk"]["transfers"]
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        assert client.call("planner") == learnt
    next(tmp_path.rglob("speeds.msgpack")).write_bytes(b"\xc1")
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        assert client.call("planner")["engines"] == []
