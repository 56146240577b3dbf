"""The processes of the demo: a node that can be stopped and started again, and engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from connectors.vllm.process import EngineProcess
from kvstore.errors import NodeUnavailable
from kvstore.node.client import Client
from kvstore.testing.servers import S3Server

BUCKET = "kvstore-demo"
CLIENT_NAME = "demo"
START_SECONDS = 30.0
DRAIN_SECONDS = 60.0
ENGINE = {
    # float32: in bfloat16 not even vLLM's own prefix cache gives the same tokens as computing everything.
    "dtype": "float32", "enforce_eager": True, "seed": 0, "max_num_seqs": 4, "block_size": 32,
    "max_model_len": 8192, "max_num_batched_tokens": 8192,
}  # fmt: skip
ENGINE_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Node:
    """``kvstore node`` with all three tiers, in a process whose messages go to a file."""

    def __init__(self, folder: Path, s3: S3Server) -> None:
        self.log = folder / "node.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = folder / "node.sock"
        self.directory = folder / "node"
        self._secret = folder / "secret"
        self._secret.write_text(os.urandom(32).hex())
        self._settings = {
            "host.bytes": "1GiB",
            "disk.bytes": "1GiB",
            "disk.segment_bytes": "256MiB",
            "write.queue_bytes": "256MiB",
            "object.url": f"s3://{BUCKET}/demo",
            "object.endpoint": s3.endpoint,
            "object.access_key_id": s3.access_key,
            "object.secret_access_key": s3.secret_key,
            "object.create_bucket": "true",
            "identity.secret_file": self._secret,
            "node.directory": self.directory,
            "node.socket": self.socket,
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = [text for name, value in self._settings.items() for text in ("--set", f"{name}={value}")]
        argv = [sys.executable, "-m", "kvstore", "node", *settings]
        with self.log.open("a") as log:
            process = self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.status()
                return
            except NodeUnavailable:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise self._fail("the node did not start") from None
                time.sleep(0.1)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def status(self) -> dict[str, Any]:
        with Client(self.socket, name=CLIENT_NAME) as client:
            status: dict[str, Any] = client.call("status")
        return status

    def blocks(self) -> dict[str, int]:
        """How many blocks each tier holds."""
        return {tier["medium"]: tier["blocks"] for tier in self.status()["tiers"]}

    def drain(self) -> None:
        """Until everything saved is on disk and in the bucket."""
        with Client(self.socket, name=CLIENT_NAME) as client:
            if not client.call("drain", DRAIN_SECONDS + 1, timeout=DRAIN_SECONDS)["drained"]:
                raise self._fail(f"blocks are still waiting to be written after {DRAIN_SECONDS:g} s")

    def restart(self, lose_disk: bool = False) -> None:
        """Stop and start again; return when it knows its bucket and every client has come back."""
        before = self.status()
        self.stop()
        if lose_disk:
            shutil.rmtree(self.directory)
        self.start()
        deadline = time.monotonic() + START_SECONDS
        while _engines(status := self.status()) < _engines(before) or _stored(status) < _stored(before):
            if time.monotonic() > deadline:
                raise self._fail("the node did not come back to what it was")
            time.sleep(0.1)

    def _fail(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}; the end of its log:\n{self.log.read_text()[-3000:]}")


def _engines(status: dict[str, Any]) -> int:
    return sum(client["name"] != CLIENT_NAME for client in status["clients"])


def _stored(status: dict[str, Any]) -> int:
    return sum(tier["blocks"] for tier in status["tiers"] if tier["medium"] == "object")


@contextmanager
def engine(folder: Path, name: str, model: Path, node: Node | None) -> Iterator[EngineProcess]:
    """A vLLM engine that is up and has answered once, with or without the store."""
    store = {"socket": str(node.socket), "autostart": False} if node else None
    with (folder / f"{name}.log").open("w") as log:
        with EngineProcess(str(model), store, ENGINE, ENGINE_ENVIRONMENT, log.fileno()) as process:
            try:
                process.ready()
                process.generate(["Warm up."], max_tokens=1)
                yield process
            except RuntimeError as error:
                raise RuntimeError(f"{error}; the end of its log:\n{Path(log.name).read_text()[-3000:]}") from error
