"""Nodes for tests, demos and studies: in a thread of the own process, or in a process that can be killed."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from kvstore.config import Config, load
from kvstore.errors import NodeUnavailable
from kvstore.identity import BlockKey, Namespace
from kvstore.node.api import About, Description, Lookup, NewBlock, Reserved
from kvstore.node.client import Client
from kvstore.node.server import Node
from kvstore.tenants.credentials import engine_token
from kvstore.testing.background import Background
from kvstore.testing.servers import Daemon
from kvstore.tiers.base import Medium

ANSWER_SECONDS = 60.0
"""Half of what a test may take."""
DRAIN_SECONDS = 60.0
STOP_SECONDS = 30.0
"""More than a node takes to write down what is queued."""


class PatientClient(Client):
    """A client that waits for the node's answer, whatever else the machine does: who looks wants to know what the node says.

    An engine's own client gives a lookup up after 50 ms. What the node itself is told to end sooner (``acquire``), it does.
    """

    grace_seconds = ANSWER_SECONDS

    def __init__(
        self,
        socket_path: str | Path,
        name: str = "client",
        connect_timeout: float = ANSWER_SECONDS,
        token: Callable[[], str] = engine_token,
    ) -> None:
        super().__init__(socket_path, name, connect_timeout, token)

    def lookup(
        self,
        keys: Sequence[BlockKey],
        start: int = 0,
        timeout: float = ANSWER_SECONDS,
        about: About | None = None,
        waiting: int | None = None,
        states: int = 0,
    ) -> Lookup:
        return super().lookup(keys, start, timeout, about, waiting, states)

    def holds(
        self, keys: Sequence[BlockKey], timeout: float = ANSWER_SECONDS, namespace: Namespace | None = None
    ) -> list[bool]:
        return super().holds(keys, timeout, namespace)

    def delete(self, keys: Sequence[BlockKey], timeout: float = ANSWER_SECONDS) -> None:
        super().delete(keys, timeout)

    def describe(self, about: About, description: Description, timeout: float = ANSWER_SECONDS) -> None:
        super().describe(about, description, timeout)

    def reserve(
        self,
        namespace: Namespace,
        blocks: Sequence[NewBlock],
        part: int = 0,
        parts: int = 1,
        timeout: float = ANSWER_SECONDS,
    ) -> Reserved:
        return super().reserve(namespace, blocks, part, parts, timeout)

    def commit(
        self,
        keys: Sequence[BlockKey],
        part: int = 0,
        durable: Medium = Medium.HOST,
        timeout: float = ANSWER_SECONDS,
    ) -> tuple[BlockKey, ...]:
        return super().commit(keys, part, durable, timeout)

    def call(self, verb: str, timeout: float = ANSWER_SECONDS, /, **arguments: Any) -> Any:
        return super().call(verb, timeout, **arguments)


class RunningNode(Background):
    """A node with an event loop of its own; a context manager that stops it. Raises what kept the node from starting."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        """Files and socket go to ``directory``; ``overrides`` are ``section.key=value`` texts over a small default."""
        small = ["host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB"]
        places = [f"node.directory={directory}", f"node.socket={directory / 'node.sock'}"]
        self.config: Config = load(None, [*places, *small, *overrides], environ={}).config
        self.socket = self.config.node.socket
        self.node: Node
        super().__init__("node")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        async with Node.open(self.config) as self.node:
            yield


class NodeProcess:
    """``kvstore node`` in a process of its own; starts again on the same files. A context manager."""

    def __init__(self, directory: Path, *settings: str, config: Path | None = None) -> None:
        """Socket, log and ``data/`` go to ``directory``; ``settings`` are ``section.key=value`` texts over ``config``."""
        self.directory = directory
        self.socket = directory / "node.sock"
        self.data = directory / "data"
        places = [f"node.directory={self.data}", f"node.socket={self.socket}"]
        argv = [sys.executable, "-m", "kvstore", "node", *(f"--set={text}" for text in (*places, *settings))]
        argv += ["--config", str(config)] if config else []
        self.daemon = Daemon(argv, directory / "node.log", self._answers, patience=STOP_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.stop()

    def start(self) -> None:
        """Start and wait until it answers. Raises ServerUnavailable with the end of its log."""
        self.daemon.start()

    def stop(self) -> None:
        """Stop as SIGTERM does, and wait. Raises RuntimeError with the end of its log if it did not end well."""
        if status := self.daemon.stop():
            raise RuntimeError(f"the node ended with status {status}:\n{self.daemon.tail()}")

    def kill(self) -> None:
        """SIGKILL."""
        self.daemon.kill()

    def client(self) -> Client:
        return PatientClient(self.socket, name=_OWN_NAME)

    def status(self) -> dict[str, Any]:
        """The node's own account of itself. Raises NodeUnavailable."""
        with self.client() as client:
            status: dict[str, Any] = client.call("status")
        return status

    def blocks(self) -> dict[str, int]:
        """How many blocks each tier holds, by medium."""
        return {tier["medium"]: tier["blocks"] for tier in self.status()["tiers"]}

    def clients(self) -> int:
        """Who else is connected and has said what it asks about: two for an engine of one rank."""
        clients = self.status()["clients"]
        return sum(client["name"] != _OWN_NAME and client["namespace"] is not None for client in clients)

    def drain(self) -> None:
        """Wait until what was saved is in every tier. Raises RuntimeError with the end of its log."""
        with self.client() as client:
            if not client.call("drain", DRAIN_SECONDS + 5, timeout=DRAIN_SECONDS)["drained"]:
                raise RuntimeError(f"not all was written in {DRAIN_SECONDS:g} s:\n{self.daemon.tail()}")

    def _answers(self) -> bool:
        try:
            return bool(self.status())
        except NodeUnavailable:
            return False


_OWN_NAME = "testing"


def alter_host_blocks(client: Client, only: Container[BlockKey] | None = None) -> int:
    """Change the first page of every block in host memory, or of some, as a broken engine would; how many these are.

    Blocks of the host tier are not verified when they are loaded, so this is what wrong KV looks like to an engine.
    """
    blocks = client.call("list", medium="host", limit=1000)["blocks"]
    held = [BlockKey(bytes(block["key"])) for block in blocks]
    keys = [key for key in held if only is None or key in only]
    for key in keys:
        acquired = client.acquire([key], 5)
        for offset in acquired.offsets:
            page = acquired.arena.buffer[offset : offset + 4096]
            acquired.arena.buffer[offset : offset + 4096] = bytes(byte ^ 0x40 for byte in page)
        client.release([key])
    return len(keys)


def flip_every_fifth_block(node: NodeProcess) -> int:
    """Flip a bit in the payload of every fifth block of a stopped node's disk, from the fourth on; how many these are."""
    return sum(_flip_every_fifth_block(file) for file in node.data.rglob("*") if file.is_file())


def _flip_every_fifth_block(segment: Path) -> int:
    with segment.open("r+b") as file:
        payloads = []
        while page := file.read(4096):
            if page.startswith(b"KVBLOCK\x00"):
                payloads.append(file.tell())
        flipped = payloads[3::5]
        for payload in flipped:
            file.seek(payload + 1000)
            (byte,) = file.read(1)
            file.seek(payload + 1000)
            file.write(bytes([byte ^ 1]))
    return len(flipped)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain")
        time.sleep(0.02)
