"""Real vLLM over a real LMCache server over a real node, as the example starts them: what one computed, the disk gives back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, wait_for
from kvstore.testing.servers import Daemon, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
CHUNK = 64
CHUNKS = 6
PROMPTS = [random.Random(seed).choices(range(3, 300), k=CHUNKS * CHUNK + 10) for seed in range(2)]
ENGINE = [
    "--host=127.0.0.1", "--served-model-name=toy", "--dtype=float32", "--enforce-eager", "--max-model-len=1024",
    "--max-num-seqs=4", "--block-size=32", "--num-gpu-blocks-override=100", "--no-enable-prefix-caching",
    "--distributed-executor-backend=uni",
]  # fmt: skip
LMCACHE = f"--supported-transfer-mode engine_driven --chunk-size {CHUNK} --l1-size-gb 0.25 --l1-init-size-gb 0"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONPATH": str(ROOT), "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
}  # fmt: skip


class Stack:
    """The three of them."""

    def __init__(self, node: NodeProcess, engine: str, lmcache: str) -> None:
        self.node = node
        self._engine, self._lmcache = engine, lmcache

    def complete(self) -> list[str]:
        """The engine's answer to each prompt."""
        answers = []
        for prompt in PROMPTS:
            body = {"model": "toy", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(self._engine + "/v1/completions", json=body, timeout=120).raise_for_status()
            answers.append(answer.json()["choices"][0]["text"])
        return answers

    def forget(self) -> None:
        """Empty LMCache's own memory. vLLM keeps nothing here."""
        httpx.post(self._lmcache + "/cache/clear", timeout=30).raise_for_status()

    def healthy(self) -> bool:
        """Whether LMCache reaches the node."""
        (status,) = httpx.get(self._lmcache + "/status", timeout=30).json()["storage_manager"]["l2_adapters"]
        return bool(status["is_healthy"])

    def loads(self) -> dict[str, float]:
        """Chunks that the node has given back since its start, by tier."""
        name = "kvstore_delivered_blocks_total{tier="
        counters = self.node.status()["counters"]
        return {key.removeprefix(name).rstrip("}"): n for key, n in counters.items() if key.startswith(name) and n}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("lmcache")
    model = make_model(folder / "model", ["the lamp by the window went out when the winter came"])
    port, lmcache, http = free_port(), free_port(), free_port()
    engine = f"http://127.0.0.1:{port}"
    with NodeProcess(folder, "host.bytes=64MiB", "disk.bytes=64MiB", "disk.segment_bytes=8MiB") as node:
        environment = {
            **ENVIRONMENT, "KVSTORE_NODE__SOCKET": str(node.socket), "KVSTORE_NODE__DIRECTORY": str(folder),
            "LMCACHE_PORT": str(lmcache), "LMCACHE_HTTP_PORT": str(http), "LMCACHE_OPTIONS": LMCACHE,
        }  # fmt: skip
        argv = [str(ROOT / "examples" / "vllm_lmcache.sh"), str(model), f"--port={port}", *ENGINE]
        example = Daemon(argv, folder / "example.log", lambda: True, environment, patience=20)
        example.start()
        try:
            wait_for(lambda: not example.running or answers(engine + "/health"), 200)
            assert example.running, example.tail()
            yield Stack(node, engine, f"http://127.0.0.1:{http}")
        finally:
            group = example.pid
            assert example.stop() == 0, example.tail()
            wait_for(lambda: not alive(group))  # nothing is left of it


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_what_vllm_computed_comes_back_through_lmcache_from_the_disk(stack: Stack) -> None:
    computed = stack.complete()
    assert computed[0] != computed[1], "the model must tell the prompts apart"
    wait_for(lambda: stack.node.blocks() == {"host": 2 * CHUNKS, "disk": 2 * CHUNKS})
    stack.node.stop()
    stack.node.start()
    wait_for(stack.healthy)
    stack.forget()
    assert stack.complete() == computed
    assert stack.loads() == {"disk": 2 * CHUNKS, "host": 2 * CHUNKS}, "brought to memory when found, then read"
    assert len(stack.node.status()["namespaces"]) == 1, "the sizes that LMCache looks for are those that it stores"


def test_altered_chunks_alter_the_answers(stack: Stack) -> None:
    """The control: what vLLM computes with is what the node gave."""
    computed = stack.complete()
    with stack.node.client() as client:
        assert alter_host_blocks(client) == 2 * CHUNKS
    stack.forget()
    assert all(text != before for text, before in zip(stack.complete(), computed, strict=True))
