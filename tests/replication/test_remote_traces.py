"""The trace of an engine's request leads into another region's bucket, and back down into this region's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from region_pair import Pair
from test_remote_node import PATIENCE, keys_of, node_in_eu, runs
from test_remote_tier import offer

from kvstore import tracing
from kvstore.testing.collector import Collected, Collector
from kvstore.testing.node import wait_for
from kvstore.tiers.base import Medium

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
pytestmark = pytest.mark.s3

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        tracing.start("kvstore", running.endpoint, 0.0)
        yield running
        tracing.stop()


async def test_one_trace_from_the_engine_into_another_region(
    pair: Pair, random_source: random.Random, tmp_path: Path, collector: Collector
) -> None:
    keys = keys_of(await offer(pair, random_source, blocks=2))
    with node_in_eu(pair, tmp_path, "policy.admission=off") as client:
        wait_for(lambda: runs(client, keys) == {Medium.REMOTE: 2})
        with tracing.span("engine", f"00-{TRACE}-{CALLER}-01"):
            acquired = client.acquire(keys, PATIENCE)
        assert acquired.media == (Medium.REMOTE,) * 2
        client.release(keys)
        assert client.call("drain", timeout=PATIENCE)["drained"]
    tracing.stop()
    spans = {span.span: span for span in collector.of(TRACE)}
    paths = [path(span, spans) for span in spans.values()]
    assert paths.count(("engine", "node acquire", "remote get", "object GET")) == 2
    assert paths.count(("engine", "node acquire", "object put", "object PUT")) == 2
    assert {span.trace for span in collector.spans} == {TRACE}, "nothing else was sampled"


def path(span: Collected, spans: dict[str, Collected]) -> tuple[str, ...]:
    """From the engine down to the span."""
    return (span.name,) if span.parent == CALLER else (*path(spans[span.parent], spans), span.name)
