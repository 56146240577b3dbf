"""Processes of the demo, each of which can be stopped and started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from kvstore.errors import NodeUnavailable
from kvstore.node.client import Client
from kvstore.testing.servers import S3Server

BUCKET = "kvstore-demo"
CLIENT_NAME = "demo"
START_SECONDS = 30.0
DRAIN_SECONDS = 60.0
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


class _Process:
    """A child process whose messages go to a log file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to end, and wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def _spawn(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            self._process = subprocess.Popen([sys.executable, *arguments], stderr=log, text=True, **options)
        return self._process

    def _fail(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}; the end of {self.log}:\n{self.log.read_text()[-3000:]}")


class Node(_Process):
    """``kvstore node`` with all three tiers."""

    def __init__(self, folder: Path, s3: S3Server) -> None:
        super().__init__(folder, "node")
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

    def start(self) -> None:
        settings = [text for name, value in self._settings.items() for text in ("--set", f"{name}={value}")]
        process = self._spawn(["-m", "kvstore", "node", *settings], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.status()
                return
            except NodeUnavailable:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise self._fail("the node did not start") from None
                time.sleep(0.1)

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


def _engines(status: dict[str, Any]) -> int:
    return sum(client["name"] != CLIENT_NAME for client in status["clients"])


def _stored(status: dict[str, Any]) -> int:
    return sum(tier["blocks"] for tier in status["tiers"] if tier["medium"] == "object")


class Engine(_Process):
    """``engine.py``."""

    def __init__(self, folder: Path, name: str, model: Path, node: Node | None) -> None:
        super().__init__(folder, name)
        self._arguments = ["-m", "benchmarks.demo.engine", "--model", str(model)]
        if node:
            self._arguments += ["--socket", str(node.socket)]

    def start(self) -> None:
        environment = {**os.environ, **ENGINE_ENVIRONMENT}
        self._spawn(self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._line()

    def ask(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Answer the prompts one after the other."""
        assert self._process is not None, "not started"
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        print(json.dumps(prompts), file=stdin, flush=True)
        answers: list[dict[str, Any]] = json.loads(self._line())
        return answers

    def _line(self) -> str:
        assert self._process is not None, "not started"
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        if not line:
            raise self._fail("the engine ended")
        return line
