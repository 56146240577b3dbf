"""The example router before two real vLLM servers on a CPU, each with a node of its own that knows the other as its peer.

The engines have no prefix cache of their own: what is not computed comes from their nodes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from connectors.vllm.process import transfer_config
from connectors.vllm.testing import PATIENT
from kvstore.config.schema import PUBLIC_SECRET
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, wait_for
from kvstore.testing.servers import Daemon, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NODE = [
    "host.bytes=64MiB",
    "host.extent_bytes=8MiB",
    "disk.enabled=false",
    "policy.planner=off",
    "policy.prefetch=wait_complete",
]
"""Without the planner all that is stored is loaded, also where a tiny model would be computed as fast."""
ENGINE = [
    "--dtype=float32", "--enforce-eager", "--max-model-len=4096", "--max-num-seqs=4", "--block-size=32",
    "--num-gpu-blocks-override=200", "--no-enable-prefix-caching",
]  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip
MODEL = "toy"
WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


@dataclass
class Place:
    """A vLLM server with its node."""

    node: NodeProcess
    api: str
    events: str
    engine: Daemon
    url: str

    def kill_engine(self) -> None:
        """SIGKILL for the server and its workers."""
        os.killpg(self.engine.pid, signal.SIGKILL)
        self.engine.stop()

    def loaded(self) -> float:
        """Prompt tokens that the engine had from its node so far."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:kvstore_tokens_loaded_total")
        )


@dataclass
class Fleet:
    """Two places and the router before them."""

    places: list[Place]
    router: str
    following: str
    """A second router, that follows events."""

    def complete(self, prompt: str, url: str = "") -> tuple[str, str]:
        """The text, and the engine that made it, by the router or by one engine."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = httpx.post((url or self.router) + "/v1/completions", json=body, timeout=120).raise_for_status()
        return answer.json()["choices"][0]["text"], answer.headers.get("x-routed-to", url)

    def stream_chat(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, "stream": True}
        text = []
        with httpx.stream("POST", self.router + "/v1/chat/completions", json=body, timeout=120) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
        assert len(text) > 2, "piece by piece"
        return "".join(text), answer.headers["x-routed-to"]


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("router")
    model = make_model(folder / "model", [prose(0, 2000)])
    apis = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with ExitStack() as stack:
        places = []
        for number, api in enumerate(apis):
            (folder / str(number)).mkdir()
            peers = f"api.peers=http://{apis[1 - number]}"
            events = f"ipc://{folder / str(number) / 'events'}"
            settings = [*NODE, f"api.listen={api}", f"events.listen={events}", peers]
            node = stack.enter_context(NodeProcess(folder / str(number), *settings))
            store = transfer_config({"socket": str(node.socket), "autostart": False, "model": MODEL, **PATIENT})
            port = free_port()
            arguments: list[str] = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL, *ENGINE]
            argv = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *arguments]
            argv += ["--kv-transfer-config", json.dumps(store)]
            url = f"http://127.0.0.1:{port}"
            engine = Daemon(argv, folder / f"engine{number}.log", lambda: True, ENVIRONMENT)
            stack.callback(engine.stop)
            engine.start()
            places.append(Place(node, f"http://{api}", events, engine, url))
        for place in places:  # both are starting: most of it is importing
            wait_for(lambda place=place: not place.engine.running or answers(place.url + "/health"), 300)
            assert place.engine.running, place.engine.tail()
        secret = folder / "secret"
        secret.write_bytes(PUBLIC_SECRET)
        follow = [f"--secret-file={secret}", *(f"--events={place.api}={place.events}" for place in places)]
        yield Fleet(places, *(stack.enter_context(router(folder, places, more)) for more in ([], follow)))


@contextmanager
def router(folder: Path, places: list[Place], more: list[str]) -> Iterator[str]:
    """Its address."""
    port = free_port()
    argv = [sys.executable, str(ROOT / "examples" / "router.py"), "--port", str(port), *more]
    argv += [f"--engine={place.url}={place.api}" for place in places]
    argv += ["--prefill-tokens-per-second=1000", "--patience=10"]
    url = f"http://127.0.0.1:{port}"
    daemon = Daemon(argv, folder / "router.log", lambda: answers(url + "/openapi.json"))
    try:
        daemon.start()
        yield url
    finally:
        daemon.stop()


def test_the_next_turn_goes_where_the_prefix_is(fleet: Fleet) -> None:
    for number, place in reversed(list(enumerate(fleet.places))):
        first = prose(number + 1, 500)
        fleet.complete(first, place.url)
        wait_for(lambda place=place: place.node.blocks()["host"] > 5)
        other = fleet.places[1 - number]
        before, elsewhere = place.loaded(), other.loaded()
        second = first + prose(number + 10, 60)
        text, routed = fleet.complete(second)
        assert routed == place.url
        wait_for(lambda place=place, before=before: place.loaded() - before > 300)  # told with the next step
        assert other.loaded() == elsewhere
        assert fleet.complete(second, other.url)[0] == text, "as if nothing had been cached"


def test_a_conversation_that_streams_stays_where_it_began(fleet: Fleet) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": prose(20, 500)}]
    held = {place.url: place.node.blocks()["host"] for place in fleet.places}
    reply, first = fleet.stream_chat(messages)
    place = next(place for place in fleet.places if place.url == first)
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": prose(21, 30)}]
    wait_for(lambda: place.node.blocks()["host"] > held[first] + 5)
    before = place.loaded()
    assert fleet.stream_chat(messages)[1] == first
    wait_for(lambda: place.loaded() > before)


def test_following_events_finds_the_prefix_too(fleet: Fleet) -> None:
    for number, place in reversed(list(enumerate(fleet.places))):
        first = prose(number + 40, 500)
        held = place.node.blocks()["host"]
        fleet.complete(first, place.url)
        wait_for(lambda place=place, held=held: place.node.blocks()["host"] > held + 5)
        time.sleep(0.5)  # events go out after 10 ms, and nothing says when they have come
        assert fleet.complete(first + prose(50, 30), fleet.following)[1] == place.url


def test_a_primed_prompt_is_loaded_when_it_is_asked_for(fleet: Fleet, tmp_path: Path) -> None:
    """``kvstore warm --prime`` sends what nobody has computed yet through a real engine, once."""
    place, texts = fleet.places[0], [prose(60, 500), prose(61, 500)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    held = place.node.blocks()["host"]
    command = [
        "warm",
        "--prime",
        place.url,
        "--prompts",
        str(file),
        "--set",
        f"node.socket={place.node.socket}",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "kvstore", *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"] == 2
    wait_for(lambda: place.node.blocks()["host"] >= held + 10)
    before = place.loaded()
    fleet.complete(texts[0] + prose(62, 20), place.url)
    wait_for(lambda: place.loaded() - before > 300)


def test_requests_go_on_without_a_node_and_without_an_engine(fleet: Fleet) -> None:
    """Last, for what it kills."""
    first, second = fleet.places
    prompt = prose(30, 500)
    fleet.complete(prompt, second.url)
    second.node.kill()
    assert fleet.complete(prompt + prose(31, 30))[0], "one node is gone"
    first.node.kill()
    text, routed = fleet.complete(prompt + prose(32, 30))
    assert text, "nobody knows anything"
    by_url = {place.url: place for place in fleet.places}
    by_url.pop(routed).kill_engine()
    (left,) = by_url.values()
    again, rerouted = fleet.complete(prompt + prose(32, 30))
    assert (again, rerouted) == (text, left.url)
    left.kill_engine()
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        fleet.complete("Is anybody there?")
