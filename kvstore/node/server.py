"""The node process: a Unix socket in front of a store."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import inspect
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

import kvstore
from kvstore import tracing
from kvstore.assembly import open_store
from kvstore.audit import FILE, AuditLog
from kvstore.config import Config
from kvstore.demand import Demand
from kvstore.errors import ConfigError, KVStoreError, ProtocolError
from kvstore.gauges import NodeGauges
from kvstore.kvevents import KVEvents
from kvstore.leases import Session
from kvstore.namespaces import NamespaceBook
from kvstore.node.api import PROTOCOL_VERSION
from kvstore.node.arena import Arena
from kvstore.node.auditing import audited, changes
from kvstore.node.launch import lock_path
from kvstore.node.peers import ROOT, check_peer, listen, make_folder, peer
from kvstore.node.protocol import FrameDecoder, encode
from kvstore.node.verbs import Caller, Verbs
from kvstore.planning import Planning
from kvstore.store import Store
from kvstore.tenants.pipelines import Place, Shown, Tenants
from kvstore.tenants.verbs import tenant_verbs
from kvstore.warmth import forget_warmth

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS = 5.0
MAX_REQUESTS = 1024
"""Unanswered requests of one client; a client beyond that is broken."""
MEMORY_SECONDS = 10.0
"""Engines keep the memory of a node that is gone until they miss it, a heartbeat later, and have unregistered it."""
SWITCH_INTERVAL = 0.0002
"""Threads that move bytes need the interpreter for microseconds; the default of 5 ms would keep the disk idle (measured:
0.41-0.69 of its speed beside one busy thread)."""


class Node:
    """A running node: store, socket, clients."""

    def __init__(
        self,
        config: Config,
        arena: Arena,
        store: Store,
        namespaces: NamespaceBook,
        demand: Demand,
        tenants: Tenants | None = None,
    ) -> None:
        self.store = store
        self._tenants = tenants
        self._verbs = Verbs(
            store,
            namespaces,
            demand,
            Planning.of(config.policy, store, demand),
            config.identity.tenant,
            config.identity.secret_bytes(),
            arena.epoch,
        )
        gauges = NodeGauges(
            store, self._verbs.callers, demand.pins, lambda: self._verbs.draining, config.node.directory
        )
        store.metrics.registry.register(gauges)
        self._place = Place(self._verbs, store, arena)
        """Of everybody where there is one tenant; of operators where there are several."""
        if tenants is not None:
            tenants.changed = self._cut_off
            self._verbs.table |= tenant_verbs(tenants, self._verbs)
        self._allow_uids = frozenset(config.node.allow_uids)
        self._audit = AuditLog(config.node.directory / FILE)
        self._connections: set[_Connection] = set()
        self._handshakes: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: Config) -> AsyncIterator[Node]:
        """Start a node and stop it again, with what was saved written down as far as ``node.drain_seconds`` allow."""
        path = config.node.socket
        others = config.node.allow_uids if config.tenants.book is None else (*config.node.allow_uids, ROOT)
        make_folder(path, others)
        with _exclusive(path):
            namespaces = NamespaceBook(config.node.directory / "namespaces")
            arena = await _arena(config.host.bytes)
            if not config.disk.enabled:
                forget_warmth(config.node.directory)  # it was in the memory of the node that was here before
            tenants = None if config.tenants.book is None else Tenants(config, namespaces)
            demand = Demand(config.node.directory / "hotness.msgpack")
            try:
                store = await open_store(config, arena, namespaces, demand, tenants.shared if tenants else None)
            except BaseException:
                await demand.close()
                raise
            node = cls(config, arena, store, namespaces, demand, tenants)
            events: KVEvents | None = None
            try:
                if tenants is not None:
                    await tenants.start(store)
                if config.events.listen:
                    events = KVEvents(config.events.listen, store.host.stat)
                    store.history.listener = events.tell
                listener = listen(path, others)
                accepting = asyncio.create_task(node._accept(listener))
                try:
                    yield node
                finally:
                    node._verbs.draining = True
                    accepting.cancel()
                    listener.close()
                    path.unlink(missing_ok=True)
                    if not await store.drain(config.node.drain_seconds):
                        log.warning("stopped with writes pending", seconds=config.node.drain_seconds)
                    for connection in list(node._connections):
                        connection.close()
            finally:
                if tenants is not None:
                    await tenants.close()
                await demand.close()
                await store.close()
                if events is not None:
                    events.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            handshake = asyncio.create_task(self._welcome(client))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _welcome(self, client: socket.socket) -> None:
        client.setblocking(False)
        try:
            if self._tenants is None:
                check_peer(client, self._allow_uids)
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                caller, place, shown = await self._handshake(client)
            uid = peer(client)[1]
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: _Connection(self, caller, place, shown, uid), client)
        except (OSError, TimeoutError, ProtocolError) as error:
            log.warning("client refused", error=str(error) or "no greeting in time")
            client.close()

    def _cut_off(self) -> None:
        """Close the connections of clients that belong elsewhere by now, or nowhere."""
        for connection in list(self._connections):
            self._check_place(connection)

    def _check_place(self, connection: _Connection) -> None:
        if connection.shown is None:  # there is one tenant
            return
        try:
            if self._belongs(connection.shown) is connection.place:
                return
        except ProtocolError:
            pass
        connection.close()

    def _belongs(self, shown: Shown) -> Place:
        """Raises ProtocolError for who is of no tenant."""
        assert self._tenants is not None
        return self._tenants.place(shown) or self._place

    async def _handshake(self, client: socket.socket) -> tuple[Caller, Place, Shown | None]:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder()
        hello: Any = None
        while hello is None:
            data = await loop.sock_recv(client, 4096)
            if not data:
                raise ProtocolError("closed before its greeting")
            hello = next(decoder.feed(data), None)
        if not isinstance(hello, dict) or not isinstance(hello.get("pid"), int):
            raise ProtocolError("not a greeting")
        place, shown = self._place, None
        if self._tenants is not None:
            try:
                shown = Shown.of(client, hello)
                place = self._belongs(shown)
            except ProtocolError as error:
                await loop.sock_sendall(client, encode({"protocol": PROTOCOL_VERSION, "refused": str(error)}))
                raise
        welcome = {
            "protocol": PROTOCOL_VERSION,
            "version": kvstore.__version__,
            "epoch": place.arena.epoch,
            "arena_bytes": place.arena.nbytes,
        }
        socket.send_fds(client, [encode(welcome)], [place.arena.fd])
        if hello.get("protocol") != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol {hello.get('protocol')!r} is not {PROTOCOL_VERSION}")
        return Caller(str(hello.get("name"))[:64], hello["pid"], Session(), time.monotonic()), place, shown


class _Connection(asyncio.Protocol):
    """One client. Requests that need no I/O are answered in the call that received them."""

    def __init__(self, node: Node, caller: Caller, place: Place, shown: Shown | None, uid: int) -> None:
        self.place = place
        self.shown = shown
        self._node = node
        self._caller = caller
        self._uid = uid
        self._decoder = FrameDecoder()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._node._connections.add(self)
        self.place.verbs.callers.add(self._caller)
        log.info("client connected", client=self._caller.name, pid=self._caller.pid)
        self._node._check_place(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._node._connections.discard(self)
        self.place.verbs.callers.discard(self._caller)
        for task in self._tasks:
            task.cancel()
        ending = asyncio.gather(*self._tasks, return_exceptions=True)
        ending.add_done_callback(lambda _: self.place.store.end(self._caller.session))
        log.info("client left", client=self._caller.name, pid=self._caller.pid)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._dispatch(message)
        except ProtocolError as error:
            log.warning("client dropped", client=self._caller.name, pid=self._caller.pid, error=str(error))
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _dispatch(self, message: object) -> None:
        match message:
            case [int(request), str(verb), dict(arguments)]:
                pass
            case _:
                raise ProtocolError("not a request")
        handler = self.place.verbs.table.get(verb)
        if handler is None:
            self._answer(request, ProtocolError(f"unknown verb {verb!r}"))
            return
        if changes(verb, arguments):
            handler = audited(verb, handler, self._uid, self._node._audit)
        try:
            result = handler(self._caller, arguments)
        except KVStoreError as error:
            self._answer(request, error)
            return
        if not inspect.isawaitable(result):
            self._answer(request, None, result)
            return
        if len(self._tasks) >= MAX_REQUESTS:
            raise ProtocolError(f"more than {MAX_REQUESTS} requests at once")
        task = asyncio.ensure_future(self._finish(request, result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, request: int, work: Any) -> None:
        try:
            self._answer(request, None, await work)
        except KVStoreError as error:
            self._answer(request, error)

    def _answer(self, request: int, error: KVStoreError | None, result: Any = None) -> None:
        if request and self._transport is not None:
            reply = [request, None, result] if error is None else [request, type(error).__name__, str(error)]
            self._transport.write(encode(reply))


async def serve(config: Config) -> None:
    """Run a node until SIGTERM or SIGINT. Raises ConfigError when it cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    telemetry = config.telemetry
    with tracing.exporting("kvstore-node", telemetry.otlp_endpoint, telemetry.sample_ratio):
        await _serve(config, stop)


async def _serve(config: Config, stop: asyncio.Event) -> None:
    async with Node.open(config):
        gc.collect()
        gc.freeze()  # what was imported stays: looking through it again takes 30 ms, and every lookup would wait
        log.info("listening", socket=str(config.node.socket), arena_bytes=config.host.bytes)
        await stop.wait()
        log.info("stopping")


async def _arena(nbytes: int) -> Arena:
    """A new arena, as soon as there is memory for it. Raises ConfigError when there is none in time, or can never be."""
    deadline = time.monotonic() + (MEMORY_SECONDS if nbytes <= Arena.most_bytes() else 0.0)
    while True:
        try:
            return Arena.create(nbytes, secrets.randbits(63) or 1)
        except ConfigError as error:
            if time.monotonic() > deadline:
                raise
            log.info("waiting for memory that may be given back", error=str(error))
        await asyncio.sleep(0.5)


@contextlib.contextmanager
def _exclusive(path: Path) -> Any:
    """Hold the lock that makes this the only node at ``path``. Raises ConfigError when another one holds it."""
    with open(lock_path(path), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "node.socket", str(path), "another node is running there", "Stop it, or choose another socket."
            ) from None
        yield
