"""Two tensor-parallel ranks in processes of their own, on a node that the connector starts by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import PATIENT
from kvstore.errors import KVStoreError
from kvstore.testing.model import make_model
from kvstore.testing.node import PatientClient

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = [
    "the lamp by the window went out when the winter came " * 20 + ending for ending in ("at last", "again", "soon")
]
CONFIG = """
[host]
bytes = "64MiB"
extent_bytes = "8MiB"
[disk]
bytes = "64MiB"
segment_bytes = "32MiB"
[node]
directory = "{}"
"""


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a node will listen, which is ended at the end."""
    socket = tmp_path_factory.mktemp("node") / "node.sock"
    yield socket
    with suppress(KVStoreError):
        os.kill(status(socket)["pid"], signal.SIGTERM)


@pytest.fixture(scope="module")
def engine(socket: Path) -> Iterator[EngineProcess]:
    model = make_model(socket.parent / "model", PROMPTS)
    config = socket.parent / "kvstore.toml"
    config.write_text(CONFIG.format(socket.parent / "data"))
    arguments = {
        "dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "seed": 0, "block_size": 32,
        "num_gpu_blocks_override": 100, "tensor_parallel_size": 2,
    }  # fmt: skip
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1", "KVSTORE_CONFIG": str(config)}
    log = os.open(socket.parent / "engine.log", os.O_WRONLY | os.O_CREAT)
    with EngineProcess(str(model), {"socket": str(socket), **PATIENT}, arguments, environment, log) as engine:
        os.close(log)
        engine.ready()
        yield engine


def status(socket: Path) -> Any:
    with PatientClient(socket) as client:
        return client.call("status")


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def loaded(engine: EngineProcess) -> float:
    return sum(value for name, value in engine.counters().items() if name.startswith("vllm:kvstore_tokens_loaded"))


def test_ranks_share_blocks_and_survive_their_node(engine: EngineProcess, socket: Path) -> None:
    wait(lambda: connected(socket))
    computed = [engine.generate([prompt], 16)[0] for prompt in PROMPTS]
    expected = [answer.tokens for answer in computed]

    def saved() -> bool:
        host = next(tier for tier in status(socket)["tiers"] if tier["medium"] == "host")
        if host["blocks"] >= computed[0].prompt_tokens // 64:
            return True
        engine.forget()  # a save for which the node was late is dropped: it is made when the prompt is computed again
        assert engine.generate(PROMPTS[:1], 16)[0].tokens == expected[0]
        return False

    wait(saved)
    engine.forget()
    answers = [engine.generate([prompt], 16)[0] for prompt in PROMPTS]
    assert [answer.tokens for answer in answers] == expected
    first = loaded(engine)
    assert first >= computed[0].prompt_tokens // 64 * 64

    def loads_in_step() -> bool:
        """From the arena that both ranks have told of, what the scheduler's side holds for them."""
        engine.forget()
        assert engine.generate(PROMPTS[:1], 16)[0].tokens == expected[0]
        return engine.counters().get("vllm:kvstore_loads{in_step}", 0) > 0

    wait(loads_in_step)

    os.kill(status(socket)["pid"], signal.SIGKILL)
    engine.forget()
    assert [answer.tokens for answer in engine.generate(PROMPTS, 16)] == expected

    def loads_again() -> bool:
        engine.forget()
        assert [answer.tokens for answer in engine.generate(PROMPTS, 16)] == expected
        return loaded(engine) > first

    wait(lambda: connected(socket))
    wait(loads_again)


def connected(socket: Path) -> bool:
    """Whether the scheduler and both ranks have found the node."""
    try:
        return sum(client["namespace"] is not None for client in status(socket)["clients"]) == 3
    except KVStoreError:
        return False
