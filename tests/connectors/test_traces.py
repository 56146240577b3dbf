"""One trace leads from the engine's connector over the node to the bucket; no log and no span has a word of the prompt."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

import torch

import connectors.vllm.saves as saves
from connectors.link import Link
from connectors.paging.torch import OpaquePager
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.scheduler import Planner
from connectors.vllm.timing import Timing
from connectors.vllm.worker import Mover
from kvstore import tracing
from kvstore.errors import ConfigError
from kvstore.identity import Namespace
from kvstore.testing.collector import Collected, Collector
from kvstore.testing.node import NodeProcess, PatientClient, wait_for
from kvstore.testing.servers import free_port, listens

PAGE, BLOCKS = 16, 4
NAMESPACE = Namespace(
    model="m", weights="w", dtype="uint8", layers=1, kv_heads=1, head_dim=64, attention="gqa", rope="", block_tokens=PAGE,
    layout="opaque:test",
)  # fmt: skip
GEOMETRY = Geometry(NAMESPACE, PAGE, 1, 8192)
CANARY = "xylophone-marmalade"
TOKENS = random.Random(7).sample(range(100_000_000, 999_999_999), PAGE * BLOCKS)
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Request:
    """The attributes of vLLM's request that the connector reads."""

    request_id: str
    all_token_ids: list[int] = field(default_factory=lambda: TOKENS)
    trace_headers: dict[str, str] | None = None
    cache_salt: None = None
    prompt_embeds: None = None
    lora_request: None = None
    mm_features: tuple[()] = ()
    num_preemptions: int = 0
    num_output_tokens: int = 0
    num_tokens: int = len(TOKENS)
    num_prompt_tokens: int = len(TOKENS)


class Engine:
    """Both sides of the connector, over a node's socket."""

    def __init__(self, socket: Path) -> None:
        self.link = Link(PatientClient(socket, "vLLM"), NAMESPACE, GEOMETRY.block_bytes)
        self.recorder = Recorder()
        self.planner = Planner(self.link, GEOMETRY, self.recorder, Timing(self.link, 1), 5.0)
        cache = torch.zeros(BLOCKS, GEOMETRY.block_bytes, dtype=torch.uint8)
        self.mover = Mover(self.link, OpaquePager({"layer": cache}, BLOCKS, 1), GEOMETRY, 0, self.recorder, 10.0)
        wait_for(lambda: self.link.keyring is not None)

    def save(self, request: Request) -> None:
        """As if the request's prompt had been computed."""
        self.planner.add(request)
        name = request.request_id
        scheduled = SimpleNamespace(req_id=name, num_computed_tokens=0, block_ids=[list(range(BLOCKS))])
        self.mover.begin_saves(self._step(new=[scheduled], tokens={name: len(TOKENS)}).saves)
        self.mover.finish_saves()
        self.planner.finish(request)

    def load(self, request: Request) -> int:
        """Tokens that came."""
        self.planner.add(request)
        tokens = self.planner.offer(request, 0)
        self.planner.admit(request, (range(BLOCKS),), tokens)
        for load in self._step().loads:
            self.mover.load(load).result()
        self.planner.finish(request)
        return tokens if not self.mover.take_bad_pages() else 0

    def _step(self, new: list[Any] | None = None, tokens: dict[str, int] | None = None) -> Any:
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
        output = SimpleNamespace(
            num_scheduled_tokens=tokens or {}, scheduled_new_reqs=new or [], scheduled_cached_reqs=cached
        )
        return self.planner.step(output, None)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running
    tracing.stop()


def test_one_trace_from_the_engine_to_the_bucket_without_the_prompt(
    collector: Collector, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "RESERVATION_WAIT", 30.0)
    caplog.set_level(logging.DEBUG)
    port = free_port()
    api = f"127.0.0.1:{port}"
    node = NodeProcess(
        tmp_path, "host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.enabled=false", f"object.url=file://{tmp_path}/b",
        f"telemetry.otlp_endpoint={collector.endpoint}", "telemetry.sample_ratio=0", "node.log_level=debug",
        f"api.listen={api}",
    )  # fmt: skip
    tracing.start("kvstore-vllm", collector.endpoint, 0.0)
    with node:
        engine = Engine(node.socket)
        try:
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            engine.save(Request("saved", trace_headers=headers))
            wait_for(lambda: node.blocks()["host"] == BLOCKS)
            node.drain()
            with node.client() as client:
                held = client.call("list", medium="object", limit=100)["blocks"]
                client.call("evict", medium="host", keys=b"".join(block["key"] for block in held))
            assert node.blocks() == {"host": 0, "object": BLOCKS}
            assert engine.load(Request("traced", trace_headers=headers)) == len(TOKENS)
            assert engine.load(Request("untraced")) == len(TOKENS)
            wait_for(lambda: listens(port))
            for body in ({"text": CANARY, "namespace": "m"}, {"tokens": TOKENS, "namespace": "m"}):
                post(f"http://{api}/v1/lookup", body)
            exemplars = get(f"http://{api}/metrics", "application/openmetrics-text; version=1.0.0")
        finally:
            engine.mover.close()
        node.stop()
    tracing.stop()

    spans = {span.span: span for span in collector.of(TRACE)}
    assert {span.trace for span in collector.spans} == {TRACE}, "nothing else was sampled"
    paths = {path(span, spans) for span in spans.values()}
    lookup = (("kvstore-vllm", "connector lookup"), ("kvstore-node", "node lookup"))
    load = (("kvstore-vllm", "connector load"), ("kvstore-node", "node acquire"))
    read = (("kvstore-node", "object get"), ("kvstore-node", "object GET"))
    save = (("kvstore-vllm", "connector save"), ("kvstore-node", "node commit"))
    written = (("kvstore-node", "object put"), ("kvstore-node", "object PUT"))
    assert {lookup, load, load + read, save, save + written} <= paths
    assert sum(span.name == "object GET" for span in spans.values()) == BLOCKS
    with_exemplars = {line.partition("{")[0] for line in exemplars.splitlines() if f'trace_id="{TRACE}"' in line}
    assert with_exemplars == {f"kvstore_{name}_seconds_bucket" for name in ("lookup", "load", "tier")}

    log = (tmp_path / "node.log").read_text()
    assert '"request": "traced"' in log
    assert f'"trace_id": "{TRACE}"' in log
    for text in (log, caplog.text, repr(collector.spans), exemplars):
        assert CANARY not in text
        assert [token for token in TOKENS if str(token) in text] == []


def path(span: Collected, spans: dict[str, Collected]) -> tuple[tuple[str, str], ...]:
    """From the engine's caller down to the span."""
    here = (span.service, span.name)
    if span.parent == CALLER:
        return (here,)
    return (*path(spans[span.parent], spans), here)


def post(url: str, body: object) -> None:
    """Whatever the answer is."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()


def get(url: str, accept: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10_000])
def test_a_header_that_names_no_trace_is_nobodys_parent(collector: Collector, header: str) -> None:
    tracing.start("test", collector.endpoint, 1.0)
    with tracing.span("work", header, block=b"\x01\x02"):
        assert tracing.traceparent().split("-")[1] == tracing.trace_id()
    tracing.stop()
    (span,) = collector.spans
    assert span.parent == ""
    assert span.trace != "0" * 32
    assert "0102" in span.attributes["kvstore.block"]


def test_off_costs_no_import_and_leaves_nothing() -> None:
    code = (
        "import sys, kvstore.node.server, kvstore.tracing as tracing\n"
        "with tracing.span('work', block=b'1') as span: span.set(more=1)\n"
        "assert tracing.traceparent() == tracing.trace_id() == ''\n"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_without_the_packages_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"telemetry.otlp_endpoint.*llm-kvstore\[otel\]"):
        tracing.start("test", "http://127.0.0.1:1", 1.0)
