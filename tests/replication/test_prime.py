"""Priming sends prompts once to an OpenAI-compatible endpoint: here a real HTTP server that answers as one does."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from region_cases import LLAMA
from test_warmup import arguments, node_on, prompt, save
from typer.testing import CliRunner, Result

from kvstore.cli import app
from kvstore.testing.node import PatientClient
from kvstore.tiers.object import ObjectSettings
from replication import prime
from replication.prime import EndpointUnavailable, Need, Primer


@dataclass
class Endpoint:
    """What was asked of it, and how it answers."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    statuses: list[int] = field(default_factory=list)
    """Of the next completions; 200 when there is none left."""
    at_once: int = 0
    most_at_once: int = 0
    models: object = field(default_factory=lambda: {"data": [{"id": "served-llama"}]})
    release: threading.Event | None = None
    """Completions wait for it."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, state.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.keys.add(self.headers["Authorization"])
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
                status = state.statuses.pop(0) if state.statuses else 200
            if state.release is not None:
                state.release.wait(30)
            with state.lock:
                state.at_once -= 1
            self._answer(status, {"usage": {"prompt_tokens": len(body["prompt"])}})

        def _answer(self, status: int, document: object) -> None:
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served() -> Iterator[Endpoint]:
    with endpoint() as state:
        yield state


async def test_each_prompt_is_computed_once_with_one_token(served: Endpoint) -> None:
    async with Primer(served.url, api_key="secret", at_once=2) as primer:
        report = await primer.run([[1, 2, 3], "a text", [4]])
    assert (report.sent, report.tokens, report.failed) == (3, 3 + len("a text") + 1, Counter())
    assert sorted(str(body["prompt"]) for body in served.bodies) == ["[1, 2, 3]", "[4]", "a text"]
    assert {(body["model"], body["max_tokens"]) for body in served.bodies} == {("served-llama", 1)}
    assert served.keys == {"Bearer secret"}


async def test_no_more_at_a_time_than_asked_for(served: Endpoint) -> None:
    async with Primer(f"{served.url}/v1/", "named", at_once=3) as primer:
        report = await primer.run([[number] for number in range(30)])
    assert report.sent == 30
    assert served.most_at_once <= 3


async def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_counted(
    served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prime, "FIRST_RETRY_SECONDS", 0.01)
    served.statuses = [503, 429, 200, 400]
    async with Primer(served.url, at_once=1) as primer:
        report = await primer.run([[1], [2], [3]])
    assert (report.sent, dict(report.failed)) == (2, {"status 400": 1})
    assert [body["prompt"] for body in served.bodies] == [[1], [1], [1], [2], [3]]


async def test_an_endpoint_that_goes_away_fails_the_rest(served: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prime, "FIRST_RETRY_SECONDS", 0.01)
    async with Primer("http://127.0.0.1:9", "named") as primer:
        report = await primer.run([[1], [2]])
    assert (report.sent, report.failed.total()) == (0, 2)
    async with Primer("http://127.0.0.1:9") as primer:
        with pytest.raises(EndpointUnavailable, match=r"127\.0\.0\.1:9"):
            await primer.run([[1]])
    served.models = {"data": []}
    async with Primer(served.url) as primer:
        with pytest.raises(EndpointUnavailable, match="names no model"):
            await primer.run([[1]])


async def test_what_needs_none_is_not_sent(served: Endpoint) -> None:
    needs = {1: Need.SEND, 2: Need.STORED, 3: Need.SHORT}
    async with Primer(served.url) as primer:
        report = await primer.run([[1], [2], [3], [2]], lambda prompt: needs[prompt[0]])  # type: ignore[index]
    assert report.sent == 1
    assert report.skipped == {Need.STORED: 2, Need.SHORT: 1}


def test_the_command_needs_no_node_for_texts(served: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Once upon a time"\n[5, 6, 7]\n')

    def run(*more: str) -> Result:
        return CliRunner().invoke(app, ["warm", "--prime", served.url, "--prompts", str(file), "--json", *more])

    result = run()
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["sent"], document["skipped"]) == (2, {})
    assert document["prefill_seconds_saved"] == pytest.approx((len("Once upon a time") + 3) / 20_000)
    served.statuses = [400, 400]
    assert run().exit_code == 1
    assert CliRunner().invoke(app, ["warm", "--prime", served.url]).exit_code == 2


@pytest.mark.s3
def test_what_is_stored_is_skipped(na: ObjectSettings, served: Endpoint, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder, node_on(na, Path(folder) / "a") as node:
        with PatientClient(node.socket) as engine:
            save(engine, prompt(0, 4))
        file = tmp_path / "prompts.jsonl"
        prompts = [prompt(0, 4), prompt(0, 6), prompt(1, 2), prompt(2, 1)[: LLAMA.block_tokens - 1]]
        file.write_text("\n".join(map(json.dumps, prompts)))
        options = ["--prime", served.url, "--prompts", str(file), "--namespace", "llama"]
        result = CliRunner().invoke(app, arguments(node, na, *options))
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["sent"] == 2
        assert document["skipped"] == {"stored": 1, "shorter_than_a_block": 1}
        assert sorted(len(body["prompt"]) for body in served.bodies) == [2 * 16, 6 * 16]
