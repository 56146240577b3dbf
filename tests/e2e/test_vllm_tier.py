"""The store under vLLM's own OffloadingConnector, in real engines on a CPU: what one saved, the next loads, token for token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering")

import msgspec
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch

from connectors.vllm.process import Answer, EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]
PROMPTS = [" ".join(random.Random(seed).choices(WORDS, k=400)) for seed in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), PROMPTS)


@contextmanager
def engine(model: Path, log: Path, node: NodeProcess, **more: Any) -> Iterator[EngineProcess]:
    tier = {"type": "KVStoreTier", "module_path": "connectors.vllm.tier", "autostart": False, "enable_kv_events": True}
    offloading = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tests.e2e.cpu_tiering",
            "cpu_bytes_to_use": 64 << 20,
            "self_describing_kv_events": True,
            "secondary_tiers": [{**tier, "socket": str(node.socket)}],
        },
    }
    sizes = {"max_model_len": 2048, "num_gpu_blocks_override": 200}
    with cpu_engine(model, log, **sizes, **more, kv_transfer_config=offloading) as process:
        process.ready()
        yield process


class Router:
    """A subscriber to vLLM's own KV events, as existing routers are."""

    def __init__(self, address: str) -> None:
        self.publisher = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": address}
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(address)
        self._socket.subscribe(b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def stored(self, medium: str) -> dict[bytes, list[int]]:
        """Hashes that some event so far says are stored there, with the event's tokens."""
        found = {}
        while self._socket.poll(1000):
            for event in self._decoder.decode(self._socket.recv_multipart()[2]).events:
                if isinstance(event, BlockStored) and event.medium == medium:
                    found |= dict.fromkeys(event.block_hashes, event.token_ids)
        return found

    def close(self) -> None:
        self._socket.close(0)


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def test_what_one_engine_saved_the_next_loads(model: Path, tmp_path: Path) -> None:
    sizes = ("host.bytes=128MiB", "disk.bytes=256MiB", "disk.segment_bytes=32MiB")
    log = tmp_path / "engines.log"
    router = Router(f"ipc://{tmp_path / 'events'}")
    with NodeProcess(tmp_path, *sizes) as node:
        with engine(model, log, node, kv_events_config=router.publisher) as first:
            computed = tokens(first.generate(PROMPTS, 16))
            assert any(router.stored("STORAGE").values()), "a router that matches prompts learns of the store"
            wait_for(lambda: node.blocks()["host"] > 0)
            node.drain()
        saved = node.blocks()
        assert saved["disk"] == saved["host"]

        node.stop()  # the next engine's blocks come from the disk
        node.start()
        with engine(model, log, node) as second:
            answers = second.generate(PROMPTS, 16)
            assert tokens(answers) == computed
            assert all(answer.cached_tokens > answer.prompt_tokens * 0.8 for answer in answers), answers
            assert node.blocks()["disk"] == saved["disk"], "nothing was stored twice"

        with node.client() as client:
            assert alter_host_blocks(client) > 0
        with engine(model, log, node) as misled:
            assert tokens(misled.generate(PROMPTS, 16)) != computed, "wrong KV must show, or this test proves nothing"

        with engine(model, log, node) as orphan:
            node.kill()
            assert tokens(orphan.generate(PROMPTS, 16)) == computed, "computed without a store"
    router.close()
