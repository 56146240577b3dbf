"""Clients of a node: ``Client`` for threads, ``AsyncClient`` for event loops."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import kvstore.errors
from kvstore import tracing
from kvstore.errors import DeadlineExceeded, KVStoreError, NodeUnavailable, ProtocolError
from kvstore.identity import BlockKey, Keyring, Namespace
from kvstore.node.api import (
    PROTOCOL_VERSION,
    About,
    Acquired,
    Description,
    Lookup,
    Miss,
    NewBlock,
    Plan,
    Report,
    Reserved,
)
from kvstore.node.arena import Arena
from kvstore.node.peers import check_node
from kvstore.node.protocol import FrameDecoder, encode, join_keys, split_keys
from kvstore.policy.planner import Patience, Reason
from kvstore.tenants.credentials import engine_token
from kvstore.tiers.base import Medium, Slot

GRACE_SECONDS = 0.25
"""Added to a deadline that the node keeps itself, before the client stops waiting for the answer."""

RECONNECT_SECONDS = (0.05, 1.0)
"""Least and most time between two tries to connect. In between, it is twice what the last one took, so that an engine pays little
both for a node that is gone, which is known at once, and for one that hangs."""


class Client:
    """A thread-safe client; see ``kvstore.node.api.NodeClient`` for what each call promises.

    Connects on first use and again after the node went away.
    """

    grace_seconds = GRACE_SECONDS

    def __init__(
        self,
        socket_path: str | Path,
        name: str = "client",
        connect_timeout: float = 5.0,
        token: Callable[[], str] = engine_token,
    ) -> None:
        """``connect_timeout`` is in seconds and covers the greeting. ``token`` gives what to show a node with several tenants,
        at each connection; it may raise ConfigError."""
        self._path = str(socket_path)
        self._name = name
        self._connect_timeout = connect_timeout
        self._token = token
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._retry_at = 0.0
        self._namespaces: dict[Namespace, tuple[int, bytes, Keyring]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """0 while no node is known to answer."""
        connection = self._connection
        return connection.arena.epoch if connection else 0

    @property
    def arena(self) -> Arena:
        """The arena of the node's present run; connects if need be."""
        return self._connected().arena

    def open_namespace(self, namespace: Namespace, block_bytes: int) -> Keyring:
        self._namespaces[namespace] = self._open(self._connected(), namespace, block_bytes)
        return self._namespaces[namespace][2]

    def lookup(
        self,
        keys: Sequence[BlockKey],
        start: int = 0,
        timeout: float = 0.05,
        about: About | None = None,
        waiting: int | None = None,
        states: int = 0,
    ) -> Lookup:
        more: dict[str, Any] = {"states": states} if states else {}
        if about is not None:
            more |= {"request": about.request[:128], "seed": about.seed, "lora": about.lora}
        if waiting is not None:
            more["waiting"] = waiting
        more |= _trace()
        blocks, runs, seconds, planned = self.call("lookup", timeout, keys=join_keys(keys), start=start, **more)
        plan = Plan(planned[0], Reason(planned[1]), Patience(*planned[2:])) if planned else None
        return Lookup(blocks, tuple((Medium(medium), count) for medium, count in runs), seconds, plan)

    def report(self, report: Report) -> None:
        answered = [[join_keys(keys), tokens] for keys, tokens in report.answered]
        self._tell("report", {"steps": report.steps, "loads": report.loads, "answered": answered})

    def holds(self, keys: Sequence[BlockKey], timeout: float = 0.05, namespace: Namespace | None = None) -> list[bool]:
        """Which blocks some tier holds, each by itself. With an opened namespace they count, in order, as a prompt of it."""
        counted = {} if namespace is None else {"namespace": self._namespaces[namespace][1]}
        return [bool(held) for held in self.call("holds", timeout, keys=join_keys(keys), **counted)]

    def delete(self, keys: Sequence[BlockKey], timeout: float = 10.0) -> None:
        """Delete blocks from every tier; a leased one goes when its leases do."""
        self.call("delete", timeout, keys=join_keys(keys))

    def describe(self, about: About, description: Description, timeout: float = 1.0) -> None:
        self.call("describe", timeout, request=about.request[:128], seed=about.seed, **asdict(description))

    def acquire(self, keys: Sequence[BlockKey], timeout: float) -> Acquired:
        connection = self._connected()
        offsets, media, miss = connection.call(
            "acquire",
            {"keys": join_keys(keys), "timeout": timeout, **_trace()},
            timeout + self.grace_seconds,
            undo="release",
        )
        return Acquired(connection.arena, tuple(offsets), tuple(map(Medium, media)), Miss(miss) if miss else None)

    def release(self, keys: Sequence[BlockKey]) -> None:
        self._notify("release", keys)

    def locate(self, keys: Sequence[BlockKey], timeout: float) -> list[Slot | None]:
        """Where to read blocks that are on the node's disk; None for those to acquire. For ``kvstore.node.straight``."""
        found = self.call("locate", timeout, keys=join_keys(keys))
        return [slot and Slot(found["files"][slot[0]], *slot[1:]) for slot in found["slots"]]

    def was_read(self, keys: Sequence[BlockKey], seconds: float) -> None:
        """Tell how long it took to read located blocks. Waits for no answer, never raises."""
        self._tell("was_read", {"keys": join_keys(keys), "seconds": seconds})

    def reserve(
        self, namespace: Namespace, blocks: Sequence[NewBlock], part: int = 0, parts: int = 1, timeout: float = 1.0
    ) -> Reserved:
        connection = self._connected()
        arguments = {
            "namespace": self._namespaces[namespace][1],
            "keys": join_keys([block.key for block in blocks]),
            "parents": join_keys([block.parent for block in blocks]),
            "indices": [block.index for block in blocks],
            "part": part,
            "parts": parts,
        }
        answers = connection.call("reserve", arguments, timeout, undo="abort")
        misses = {i: Miss(answer) for i, answer in enumerate(answers) if isinstance(answer, str)}
        return Reserved(connection.arena, tuple(None if isinstance(a, str) else a for a in answers), misses)

    def commit(
        self, keys: Sequence[BlockKey], part: int = 0, durable: Medium = Medium.HOST, timeout: float = 10.0
    ) -> tuple[BlockKey, ...]:
        reached = self.call(
            "commit",
            timeout + self.grace_seconds,
            keys=join_keys(keys),
            part=part,
            durable=durable.value,
            timeout=timeout,
            **_trace(),
        )
        return tuple(split_keys(reached))

    def abort(self, keys: Sequence[BlockKey]) -> None:
        self._notify("abort", keys)

    def call(self, verb: str, timeout: float = 5.0, /, **arguments: Any) -> Any:
        """Any verb of the node, by name (``kvstore/node/verbs.py``); the answer as plain msgpack types."""
        return self._connected().call(verb, arguments, timeout)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _notify(self, verb: str, keys: Sequence[BlockKey]) -> None:
        self._tell(verb, {"keys": join_keys(keys)})

    def _tell(self, verb: str, arguments: dict[str, Any]) -> None:
        """Tell the node something that it need not answer. A lost connection has the same effect."""
        connection = self._connection
        if connection is not None and not connection.lost:
            connection.notify(verb, arguments)

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is not None and not self._connection.lost:
                return self._connection
            began = time.monotonic()
            if began < self._retry_at:
                raise NodeUnavailable(
                    f"no node at {self._path}; the next try is less than {RECONNECT_SECONDS[1]:g} s away"
                )
            try:
                self._connection = self._connect()
            except KVStoreError:
                self._connection = None  # and with it the arena of a node that is gone: the next may need the memory
                now = time.monotonic()
                least, most = RECONNECT_SECONDS
                self._retry_at = now + min(max(2 * (now - began), least), most)
                raise
            return self._connection

    def _connect(self) -> _Connection:
        """A connection on which the namespaces are open: all or nothing, since where one is not its blocks cannot be saved."""
        connection = _Connection(self._path, self._name, self._connect_timeout, self._token())
        for namespace, (block_bytes, _, _) in self._namespaces.items():
            try:
                self._namespaces[namespace] = self._open(connection, namespace, block_bytes)
            except (NodeUnavailable, DeadlineExceeded):
                connection.close()
                raise
            except KVStoreError:  # this run of the node refuses it: whoever opens it next is told why
                continue
        return connection

    def _open(self, connection: _Connection, namespace: Namespace, block_bytes: int) -> tuple[int, bytes, Keyring]:
        arguments = {"fields": namespace.to_dict(), "block_bytes": block_bytes}
        digest, secret = connection.call("open_namespace", arguments, self._connect_timeout)
        return block_bytes, digest, Keyring(secret)


class AsyncClient:
    """The same calls for an event loop; each waits in a worker thread."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._client.close)

    async def open_namespace(self, namespace: Namespace, block_bytes: int) -> Keyring:
        return await asyncio.to_thread(self._client.open_namespace, namespace, block_bytes)

    async def lookup(
        self,
        keys: Sequence[BlockKey],
        start: int = 0,
        timeout: float = 0.05,
        about: About | None = None,
        waiting: int | None = None,
    ) -> Lookup:
        return await asyncio.to_thread(self._client.lookup, keys, start, timeout, about, waiting)

    async def acquire(self, keys: Sequence[BlockKey], timeout: float) -> Acquired:
        return await asyncio.to_thread(self._client.acquire, keys, timeout)

    async def release(self, keys: Sequence[BlockKey]) -> None:
        await asyncio.to_thread(self._client.release, keys)

    async def reserve(
        self, namespace: Namespace, blocks: Sequence[NewBlock], part: int = 0, parts: int = 1, timeout: float = 1.0
    ) -> Reserved:
        return await asyncio.to_thread(self._client.reserve, namespace, blocks, part, parts, timeout)

    async def commit(
        self, keys: Sequence[BlockKey], part: int = 0, durable: Medium = Medium.HOST, timeout: float = 10.0
    ) -> tuple[BlockKey, ...]:
        return await asyncio.to_thread(self._client.commit, keys, part, durable, timeout)

    async def abort(self, keys: Sequence[BlockKey]) -> None:
        await asyncio.to_thread(self._client.abort, keys)

    async def call(self, verb: str, timeout: float = 5.0, /, **arguments: Any) -> Any:
        return await asyncio.to_thread(lambda: self._client.call(verb, timeout, **arguments))


class _Waiter:
    """One request on its way."""

    __slots__ = ("answer", "done", "undo")

    def __init__(self) -> None:
        self.done = False
        self.answer: list[Any] = []
        self.undo: tuple[str, bytes] | None = None
        """What to tell the node if the answer comes after the caller has gone."""


class _Connection:
    """One socket shared by threads. Whoever waits first reads for everybody, so no thread is kept for reading."""

    def __init__(self, path: str, name: str, timeout: float, token: str) -> None:
        self.lost = False
        self._send_lock = threading.Lock()
        self._turn = threading.Condition()
        self._reading = False
        self._waiting: dict[int, _Waiter] = {}
        self._ids = 0
        self._decoder = FrameDecoder()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            check_node(self._socket, path)
            self.arena = self._handshake(name, token)
        except (OSError, struct.error) as error:
            self._socket.close()
            raise NodeUnavailable(f"no node answers at {path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def call(self, verb: str, arguments: dict[str, Any], timeout: float, undo: str | None = None) -> Any:
        """Ask and wait. ``undo`` is the verb that takes back what an answer nobody waits for any more has given."""
        waiter = _Waiter()
        deadline = time.monotonic() + timeout
        with self._turn:
            self._ids += 1
            request = self._ids
            self._waiting[request] = waiter
        try:
            self._send(encode([request, verb, arguments]), deadline)
            self._await(waiter, deadline)
        except BaseException:
            if undo is None:
                self._waiting.pop(request, None)
            else:
                self._undo(waiter, undo, arguments["keys"])
            raise
        error, result = waiter.answer
        if error is not None:
            raise _error(error, result)
        return result

    def notify(self, verb: str, arguments: dict[str, Any]) -> None:
        try:
            self._send(encode([0, verb, arguments]), time.monotonic() + GRACE_SECONDS)
        except (NodeUnavailable, DeadlineExceeded):
            self.close()  # what it held falls with the connection

    def close(self) -> None:
        with self._turn:
            self.lost = True
            self._turn.notify_all()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()

    def _handshake(self, name: str, token: str) -> Arena:
        shown = {"token": token} if token else {}
        self._socket.sendall(encode({"protocol": PROTOCOL_VERSION, "name": name, "pid": os.getpid(), **shown}))
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
        try:
            welcome = next(self._decoder.feed(data), None)
            if not isinstance(welcome, dict) or welcome.get("protocol") != PROTOCOL_VERSION:
                spoken = welcome.get("protocol") if isinstance(welcome, dict) else None
                raise ProtocolError(
                    f"the node speaks protocol {spoken}, this client {PROTOCOL_VERSION}: install the same version on both"
                )
            if "refused" in welcome:
                raise ProtocolError(
                    f"the node at {self._socket.getpeername()} refuses this client: {welcome['refused']}"
                )
            if len(fds) != 1:
                raise ProtocolError("the node sent no arena")
            return Arena.mapped(fds.pop(), welcome["arena_bytes"], welcome["epoch"])
        finally:
            for fd in fds:
                os.close(fd)

    def _send(self, frame: bytes, deadline: float) -> None:
        with self._send_lock:
            if self.lost:
                raise NodeUnavailable("the connection to the node was lost")
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                self._socket.sendall(frame)
            except OSError as error:  # also a time-out: half a frame may be on its way
                self.close()
                raise NodeUnavailable(f"the connection to the node was lost: {error}") from error

    def _await(self, waiter: _Waiter, deadline: float) -> None:
        while True:
            with self._turn:
                while self._reading and not waiter.done and not self.lost:
                    if not self._turn.wait(deadline - time.monotonic()):
                        raise DeadlineExceeded("the node did not answer in time")
                if waiter.done:
                    return
                if self.lost:
                    raise NodeUnavailable("the connection to the node was lost")
                self._reading = True
            try:
                self._read(deadline)
            finally:
                with self._turn:
                    self._reading = False
                    self._turn.notify_all()

    def _read(self, deadline: float) -> None:
        """Read once and hand out what it completes."""
        if not _readable(self._socket, max(deadline - time.monotonic(), 0)):
            raise DeadlineExceeded("the node did not answer in time")
        try:
            data = self._socket.recv(1 << 18)
            messages = list(self._decoder.feed(data))
        except (OSError, ProtocolError) as error:
            self.close()
            raise NodeUnavailable(f"the connection to the node was lost: {error}") from error
        if not data:
            self.close()
            raise NodeUnavailable("the node closed the connection")
        for answer in messages:
            self._hand_out(*answer)

    def _hand_out(self, request: int, error: Any, result: Any) -> None:
        with self._turn:
            waiter = self._waiting.pop(request, None)
            if waiter is None:
                return
            waiter.answer = [error, result]
            waiter.done = True
            late = waiter.undo
        if late is not None and error is None:
            self.notify(late[0], {"keys": late[1]})

    def _undo(self, waiter: _Waiter, verb: str, keys: bytes) -> None:
        """Take back what the answer gave, now or when it comes."""
        with self._turn:
            waiter.undo = (verb, keys)
            answered = waiter.done and waiter.answer[0] is None
        if answered:
            self.notify(verb, {"keys": keys})


def _trace() -> dict[str, str]:
    """The caller's span, for the node's to be its children."""
    current = tracing.traceparent()
    return {"traceparent": current} if current else {}


def _readable(sock: socket.socket, timeout: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout * 1e3))


def _error(name: object, message: object) -> KVStoreError:
    """The exception that the node named."""
    kind = getattr(kvstore.errors, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, KVStoreError)):
        kind = ProtocolError
    failure = kind.__new__(kind)
    Exception.__init__(failure, message)
    return failure
