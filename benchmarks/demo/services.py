"""The processes of the demo: a node that can be stopped and started again, and engines."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from connectors.link import HEARTBEAT_SECONDS
from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.testing.node import NodeProcess, wait_for
from kvstore.testing.servers import S3Server

BUCKET = "kvstore-demo"
ENGINE = {"max_num_seqs": 4, "max_model_len": 8192, "max_num_batched_tokens": 8192}
Say = Callable[[str], None]
"""Hears what is going on."""
NODE = [
    "host.bytes=1GiB", "disk.bytes=1GiB", "disk.segment_bytes=256MiB", "write.queue_bytes=256MiB",
    "policy.planner=off", "policy.prefetch=wait_complete",  # shows every tier, whatever is faster
]  # fmt: skip


@contextmanager
def step(say: Say, text: str) -> Iterator[None]:
    """Say what was done, and how long it took."""
    started = time.perf_counter()
    yield
    say(f"{text} ({time.perf_counter() - started:.0f} s)")


def node_on(folder: Path, s3: S3Server) -> NodeProcess:
    """A node with all three tiers, not started yet."""
    secret = folder / "secret"
    secret.write_text(os.urandom(32).hex())
    bucket = [
        f"object.url=s3://{BUCKET}/demo",
        f"object.endpoint={s3.endpoint}",
        f"object.access_key_id={s3.access_key}",
        f"object.secret_access_key={s3.secret_key}",
        "object.create_bucket=true",
        f"identity.secret_file={secret}",
    ]
    return NodeProcess(folder, *NODE, *bucket)


def restart(node: NodeProcess, lose_disk: bool = False) -> None:
    """Stop and start again; return when it knows its bucket and every client has come back."""
    clients, stored = node.clients(), node.blocks()["object"]
    node.stop()
    if lose_disk:
        shutil.rmtree(node.data)
    node.start()
    wait_for(lambda: node.clients() >= clients and node.blocks()["object"] >= stored)
    time.sleep(HEARTBEAT_SECONDS)  # a client that has come back has opened its namespace by its next heartbeat


@contextmanager
def engine(folder: Path, name: str, model: Path, node: NodeProcess | None) -> Iterator[EngineProcess]:
    """A vLLM engine that is up and has answered once, with or without the store."""
    with cpu_engine(model, folder / f"{name}.log", node.socket if node else None, **ENGINE) as process:
        process.ready()
        process.generate(["Warm up."], max_tokens=1)
        yield process
