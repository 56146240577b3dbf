"""A TCP proxy that makes a loopback connection behave like a link between regions: latency, bandwidth, loss, cuts.

User-space shaping sees a stream and not packets, so loss is shown as what it does to a stream: with the given probability a
piece of up to 64 KiB, and all that follows it on its connection, is late by one retransmission time-out.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

PIECE = 64 << 10
WINDOW = 4 << 20
"""Bytes on their way on one connection, as a large TCP window would allow."""
RETRANSMISSION_SECONDS = 0.2


@dataclass(slots=True)
class Shape:
    """What the link is like; may be changed while it is in use."""

    delay: float = 0.0
    """Seconds one way: half of a round trip."""
    bytes_per_second: float | None = None
    """Each way, for all connections together."""
    loss: float = 0.0
    """Probability of a retransmission, for each piece."""


class _Direction:
    """One way of the link, shared by all connections."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._free_at = 0.0
        """When the wire has sent what was given to it."""
        self.nbytes = 0
        """Delivered."""

    def send(self, nbytes: int) -> float:
        """Put bytes on the wire; when the last of them arrives."""
        now = time.monotonic()
        rate = self._shape.bytes_per_second
        self._free_at = max(now, self._free_at) + (nbytes / rate if rate else 0.0)
        late = RETRANSMISSION_SECONDS if self._shape.loss and random.random() < self._shape.loss else 0.0
        return self._free_at + self._shape.delay + late

    def drop(self, nbytes: int) -> None:
        """Bytes on the wire that nobody waits for any more."""
        self._free_at -= nbytes / self._shape.bytes_per_second if self._shape.bytes_per_second else 0.0


class ShapedLink:
    """A listening port that leads to ``port`` of this machine; lives in an event loop of its own. Thread-safe."""

    def __init__(self, port: int, shape: Shape) -> None:
        self.shape = shape
        self.connections = 0
        """Accepted so far."""
        self.corrupted = 0
        """Pieces that were damaged."""
        self._marked = b""
        self._damages = 0
        self._target = port
        self._up, self._down = _Direction(shape), _Direction(shape)
        self._loop = asyncio.new_event_loop()
        self._whole: asyncio.Event
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="shaped link", daemon=True)
        self._thread.start()
        started.wait()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bytes_down(self) -> int:
        """Bytes that came from the target."""
        return self._down.nbytes

    @property
    def bytes_up(self) -> int:
        """Bytes that went to the target."""
        return self._up.nbytes

    def cut(self) -> None:
        """Nothing passes any more: connections stay open, and silent."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def reset(self) -> None:
        """Break all connections, as a router that lost its state does."""
        self._loop.call_soon_threadsafe(self._abort)

    def heal(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.set)

    def corrupt(self, mark: bytes, times: int = 1) -> None:
        """Flip a bit of ``mark`` the next ``times`` it comes from the target within one piece."""
        self._marked, self._damages = mark, times

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        async def start() -> None:
            self._whole = asyncio.Event()
            self._whole.set()
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE)

        self._loop.run_until_complete(start())
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._abort()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        for task in self._pipes:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE)
        except OSError:
            writer.transport.abort()
            return
        for end in (writer, far_writer):
            self._writers.add(end)
        self._spawn(self._carry(reader, far_writer, self._up))
        self._spawn(self._carry(far_reader, writer, self._down))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._pipes.add(task)
        task.add_done_callback(self._pipes.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Direction) -> None:
        """Read, hold each piece until it arrives, write. The queue is what is on its way."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WINDOW // PIECE)
        reading = asyncio.create_task(self._read(reader, on_the_way, way))
        try:
            await self._deliver(on_the_way, writer, way)
        finally:
            reading.cancel()
            while not on_the_way.empty():
                way.drop(len(on_the_way.get_nowait()[1]))
            self._writers.discard(writer)
            writer.close()

    async def _read(
        self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]], way: _Direction
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(PIECE):
                if self._damages and way is self._down and self._marked in data:
                    data = self._damaged(data)
                await on_the_way.put((way.send(len(data)), data))
        await on_the_way.put((0.0, b""))

    async def _deliver(
        self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: _Direction
    ) -> None:
        with suppress(OSError):
            while True:
                arrives, data = await on_the_way.get()
                if (wait := arrives - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                await self._whole.wait()
                if not data:
                    return
                writer.write(data)
                way.nbytes += len(data)
                await writer.drain()

    def _damaged(self, data: bytes) -> bytes:
        self._damages -= 1
        self.corrupted += 1
        return data.replace(self._marked, bytes([self._marked[0] ^ 1]) + self._marked[1:])


@contextmanager
def shaped(endpoint: str, shape: Shape | None = None) -> Iterator[ShapedLink]:
    """A shaped link to the server at ``http://127.0.0.1:port``."""
    link = ShapedLink(int(endpoint.rstrip("/").rpartition(":")[2]), shape or Shape())
    try:
        yield link
    finally:
        link.close()
