"""Reads blocks from the node's disk straight into a client's memory: no copy, and none of the node's memory.

It is the client that reads, not the node: an engine uses a page again as soon as a load of it has ended, so whoever writes to
pages must be known to have stopped by then, and of a node that hangs that cannot be known. Here a load ends when its last
read has. The memory must be shared, as direct I/O into private memory may go astray when the process forks (open(2)).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import NamedTuple

from kvstore.envelope import HEADER_BYTES, Header, crc32c
from kvstore.errors import BlockCorrupt, ProtocolError
from kvstore.identity import BlockKey
from kvstore.node.client import Client
from kvstore.tiers.base import Slot

logger = logging.getLogger("kvstore")

THREADS = 4
"""Reads at a time: with blocks of some MiB, as many as a disk needs."""

ASKED_AT_ONCE = 1024
"""Keys in one request, as many as the node takes."""

LATE_SECONDS = 1.0
"""A load that ends so long after its deadline was the last one that reads by itself: its disk hangs."""

_PIECES = 512
"""Of a page; the kernel takes 1024 in one read."""


class Read(NamedTuple):
    """A block to read."""

    key: BlockKey
    slot: Slot
    pieces: Sequence[memoryview]
    """Where its payload goes."""


class StraightReads:
    """By any number of threads. What cannot be read so is acquired: nobody is worse off for having tried."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads = ThreadPoolExecutor(THREADS, "kvstore-read")
        self._off = False

    def locate(
        self, keys: Sequence[BlockKey], memory: Sequence[Sequence[memoryview]], deadline: float
    ) -> list[Read | None]:
        """What to read straight into ``memory``, a list of pieces for each block; None for blocks to acquire.

        Raises NodeUnavailable, DeadlineExceeded. The deadline, here and below, is one of ``time.monotonic``.
        """
        if self._off or not all(map(_is_aligned, memory)):
            return [None] * len(keys)
        slots: list[Slot | None] = []
        for at in range(0, len(keys), ASKED_AT_ONCE):
            try:
                left = max(deadline - time.monotonic(), 0.001)
                slots += self._client.locate(keys[at : at + ASKED_AT_ONCE], left)
            except ProtocolError as error:
                self._give_up(f"the node is of another version: {error}")
                return [None] * len(keys)
        return [
            Read(key, slot, pieces) if slot and slot.length == sum(map(len, pieces)) else None
            for key, slot, pieces in zip(keys, slots, memory, strict=True)
        ]

    def read(self, reads: Sequence[Read], deadline: float) -> int:
        """How many blocks came, from the first on, verified. What is behind them has undefined content.

        Returns when nothing writes to the pages any more: with a disk that answers, soon after the deadline at the latest.
        """
        if not reads:
            return 0
        started = time.monotonic()
        with ExitStack() as resources:
            try:
                files = {path: _open(path, resources) for path in dict.fromkeys(read.slot.path for read in reads)}
            except OSError as error:  # its node is in a container that we do not share files with, or is another user's
                self._give_up(f"cannot read the node's files: {error}")
                return 0
            stop = threading.Event()
            flights: list[Future[bool]] = []
            try:
                for read in reads:
                    flights.append(self._threads.submit(_read, files, read, deadline, stop))
                good = next((at for at, flight in enumerate(flights) if not flight.result()), len(flights))
            finally:
                stop.set()
                wait(flights)
        ended = time.monotonic()
        if ended > deadline + LATE_SECONDS:
            self._give_up(f"a read of the node's disk ended {ended - deadline:.1f} s late")
        if good:
            self._client.was_read([read.key for read in reads[:good]], ended - started)
        return good

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _give_up(self, why: str) -> None:
        self._off = True
        logger.warning("KV store: blocks go through the node's memory from now on: %s", why)


def _is_aligned(pieces: Sequence[memoryview]) -> bool:
    """Whether direct I/O can fill them."""
    return 0 < len(pieces) <= _PIECES and not any((_address(piece) | piece.nbytes) % HEADER_BYTES for piece in pieces)


def _address(piece: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


def _open(path: str, resources: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    resources.callback(os.close, fd)
    return fd


def _read(files: Mapping[str, int], read: Read, deadline: float, stop: threading.Event) -> bool:
    """Read and verify one block, as ``kvstore.envelope.verify`` does one in a buffer."""
    if stop.is_set() or time.monotonic() > deadline:
        return False
    head = mmap.mmap(-1, HEADER_BYTES)
    try:
        got = os.preadv(files[read.slot.path], [head, *read.pieces], read.slot.offset)
        header = Header.unpack(memoryview(head)[:got])
    except (OSError, BlockCorrupt):
        return False
    if got != HEADER_BYTES + read.slot.length or header.key != read.key or header.codecs:
        return False
    if header.length != read.slot.length:
        return False
    crc = 0
    for piece in read.pieces:
        crc = crc32c(piece, crc)
    return crc == header.crc
