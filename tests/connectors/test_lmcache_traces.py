"""What LMCache asks of the store is traced, from its backends to the node, and no trace names a chunk."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from connectors.lmcache import KVStoreConnector
from kvstore import tracing
from kvstore.errors import ConfigError
from kvstore.testing.collector import Collected, Collector
from kvstore.testing.node import RunningNode, wait_for

SIZE = 64 << 10
MODEL = "org/xylophone"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with RunningNode(tmp_path, "host.bytes=16MiB") as running:
        yield running


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running
    tracing.stop()


def settings(node: RunningNode, collector: Collector, ratio: float) -> dict[str, Any]:
    where = {"socket": str(node.socket), "autostart": False, "names": str(node.socket.with_name("names.db"))}
    return {**where, "otlp_endpoint": collector.endpoint, "trace_sample_ratio": ratio}


def paths(spans: list[Collected]) -> set[tuple[str, ...]]:
    """Names from the root of a trace down to each span."""
    by_id = {span.span: span for span in spans}

    def path(span: Collected) -> tuple[str, ...]:
        return (*(path(by_id[span.parent]) if span.parent else ()), span.name)

    return {path(span) for span in spans}


def buffers(count: int) -> list[memoryview]:
    return [memoryview(np.ones(SIZE, np.uint8)) for _ in range(count)]


def ask_connector(params: dict[str, Any]) -> None:
    """Store two chunks, ask for three, load them."""
    connector = KVStoreConnector(**params)
    keys = [f"{MODEL}@01000100@0@{number:064x}" for number in range(3)]

    def completed() -> None:
        assert select.select([connector.event_fd()], [], [], 30)[0]
        assert all(well for _, well, _, _ in connector.drain_completions())

    connector.submit_batch_set(keys[:2], buffers(2))
    completed()
    connector.submit_batch_exists(keys)
    completed()
    connector.submit_batch_get(keys, buffers(3))
    completed()
    connector.close()


def ask_adapter(params: dict[str, Any]) -> None:
    """The same, in the words of the adapter's interface."""
    api = pytest.importorskip("lmcache.v1.distributed.api")
    from connectors.lmcache import KVStoreAdapter

    adapter = KVStoreAdapter(params)
    keys = [api.ObjectKey(bytes([number]) * 32, MODEL, 0x01000100) for number in range(3)]
    items = [SimpleNamespace(byte_array=buffer) for buffer in buffers(3)]
    adapter.submit_store_task(keys[:2], items[:2])
    wait_for(adapter.pop_completed_store_tasks)
    task = adapter.submit_lookup_and_lock_task(keys, {})
    wait_for(lambda: adapter.query_lookup_and_lock_result(task) is not None)
    task = adapter.submit_load_task(keys, items)
    wait_for(lambda: adapter.query_load_result(task) is not None)
    adapter.close()


@pytest.mark.parametrize(
    ("ask", "looked_up"),
    [
        (ask_connector, {("connector lookup",)}),
        (
            ask_adapter,
            {("connector lock",), ("connector lock", "connector lookup"), ("connector lock", "node acquire")},
        ),
    ],
)
def test_each_task_is_a_trace_down_to_the_node(
    node: RunningNode,
    collector: Collector,
    ask: Callable[[dict[str, Any]], None],
    looked_up: set[tuple[str, ...]],
) -> None:
    ask(settings(node, collector, ratio=1.0))
    moved = {(f"connector {each}",) for each in ("load", "save")}
    below = {("connector load", "node acquire"), ("connector save", "node commit")}
    assert paths(collector.spans) >= looked_up | moved | below
    attributes = {span.name: span.attributes for span in collector.spans}
    for name, counts in {
        "connector save": {"blocks": 2, "saved": 2},
        "connector lookup": {"blocks": 3, "found": 2},
        "connector load": {"blocks": 3, "loaded": 2},
    }.items():
        for count, value in counts.items():
            assert attributes[name][f"kvstore.{count}"].split() == ["int_value:", str(value)]
    assert MODEL not in repr(collector.spans)


def test_only_the_share_that_is_asked_for_is_traced(node: RunningNode, collector: Collector) -> None:
    ask_connector(settings(node, collector, ratio=0.0))
    assert collector.spans == []


def test_a_share_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"adapter_params.trace_sample_ratio"):
        KVStoreConnector(trace_sample_ratio=1.5)
