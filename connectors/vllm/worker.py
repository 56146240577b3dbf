"""The worker's side: moves the bytes of one rank, following the scheduler's plan.

Threads: the engine's thread makes all calls. Loads run in threads of their own, one acquiring ahead while another copies; the
pager loads under a lock. Loads within a step are ``step_loads.py``, saves ``saves.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass

from connectors.link import Link
from connectors.paging.base import BlockCopy, Pager, Transfer
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.outbox import Outbox
from connectors.vllm.plan import Load, Save, Told
from connectors.vllm.saves import Saver
from connectors.vllm.step_loads import StepLoads
from connectors.vllm.tally import Tally
from kvstore import tracing
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.identity import BlockKey
from kvstore.node.api import Acquired, Miss
from kvstore.policy.planner import Patience

logger = logging.getLogger("vllm.kvstore")

LoadPart = tuple[BlockKey, tuple[int, ...], int]
"""A block's key, the pages to fill, and the page of the block at which they start."""

LOAD_CHUNK = 16
"""Blocks acquired at a time: enough to hide the round trip, few enough to leave the arena to others."""

COPIES_AHEAD = 2
"""Chunks of a load handed to the pager at a time: the bus does not wait while a thread hears of the end of one."""

CONCURRENT_LOADS = 2

PREPARE_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Blocks of a load that are acquired together."""

    parts: Sequence[LoadPart]
    pager: Pager

    @property
    def keys(self) -> list[BlockKey]:
        return [key for key, _, _ in self.parts]


@dataclass(frozen=True, slots=True)
class _Copying:
    """A chunk of a load on its way into the pages."""

    chunk: _Chunk
    acquired: Acquired
    copies: Sequence[BlockCopy]
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Ended:
    """Requests whose loads ended."""

    received: set[str]
    failed: set[str]
    """Those of them that hold nothing good: of several page tables no first bad page could be told to the engine."""


class Mover:
    """Loads and saves for one rank."""

    def __init__(
        self,
        link: Link,
        pager: Pager,
        geometry: Geometry,
        rank: int,
        recorder: Recorder,
        load_timeout: float,
        state_pager: Pager | None = None,
    ) -> None:
        """``state_pager`` moves what ``geometry.states`` describes."""
        self._link = link
        self._client = link.client
        self._pager = pager
        self._state_pager = state_pager
        self._geometry = geometry
        self._tables = len(geometry.tables.windows)
        self._tally = Tally(geometry, rank, recorder)
        self._recorder = recorder
        self._load_timeout = load_timeout
        self._pager_lock = threading.Lock()
        self._outbox = Outbox()
        self._in_step = StepLoads(pager, self._pager_lock, geometry, recorder, self._tally, self._outbox)
        shares = [(pager, geometry.share(rank))]
        if geometry.states is not None and state_pager is not None:
            shares.append((state_pager, geometry.states.share(rank)))
        self._savers = [Saver(link, *of, recorder, self._in_step, self._outbox) for of in shares]
        self._loads = ThreadPoolExecutor(CONCURRENT_LOADS, "kvstore-load")
        self._acquires = ThreadPoolExecutor(CONCURRENT_LOADS, "kvstore-acquire")
        self._lock = threading.Lock()
        self._load_ended = threading.Condition(self._lock)
        self._loading = 0
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._just_ended = False
        self._bad_pages: set[int] = set()
        link.on_node(self._prepare, self._forget)

    def _prepare(self) -> None:
        """Show the pager a node's arena before it is needed: pinning it takes seconds."""
        arena = self._client.acquire([], PREPARE_TIMEOUT).arena
        with self._pager_lock:
            for pager in self._pagers:
                pager.load(arena, [])
        self._in_step.prepared(arena)

    def _forget(self) -> None:
        """No node answers: let go of the arena, whose memory the next one may need."""
        with self._pager_lock:
            for pager in self._pagers:
                pager.forget()
        self._in_step.forget()

    # Saves

    def protect(self, pages: frozenset[int]) -> None:
        """Before ``pages`` are overwritten: wait for copies out of them."""
        for saver in self._savers:
            saver.protect(pages)

    def begin_saves(self, saves: Sequence[Save], states: Sequence[Save] = ()) -> None:
        """Every step, before its forward pass: ask for slots for the blocks, and the states, that it completes."""
        for saver, theirs in zip(self._savers, (saves, states), strict=False):
            saver.begin(theirs)

    def finish_saves(self) -> None:
        """After the forward pass: copy what ``begin_saves`` got slots for."""
        for saver in self._savers:
            saver.finish()

    # Loads

    def load_in_step(self, loads: Sequence[Load]) -> None:
        """Every step, before ``load`` and the forward pass, which then computes with these blocks.

        Pages of those that cannot be copied are told by ``take_bad_pages``.
        """
        bad = self._in_step.load(loads)
        with self._lock:
            self._bad_pages |= bad

    def take_told(self) -> Told | None:
        """What the scheduler's side is to hear with this step's results."""
        self._in_step.tell_ready()
        return self._outbox.take()

    def load(self, load: Load) -> Future[None]:
        """Start a load. Its end, good or bad, is reported by ``take_ended`` and ``take_bad_pages``."""
        with self._lock:
            self._loading += 1
        return self._loads.submit(self._load, load, time.monotonic())

    def take_ended(self, patience: float = 0.0) -> Ended:
        """Requests whose loads ended since the last call. Waits ``patience`` seconds for one, while there are loads.

        Not right after some ended: with asynchronous scheduling the step that computes them is yet to be scheduled.
        """
        with self._load_ended:
            if not self._just_ended:
                self._load_ended.wait_for(lambda: self._received or not self._loading, patience)
            self._just_ended = bool(self._received)
            ended, self._received, self._failed = Ended(self._received, self._failed), set(), set()
        return ended

    def take_bad_pages(self) -> set[int]:
        """Pages that were to be loaded and hold nothing good, since the last call."""
        with self._lock:
            bad, self._bad_pages = self._bad_pages, set()
        return bad

    def close(self) -> None:
        """Finish what was started, within its deadlines, and let the node go."""
        for executor in (self._loads, self._acquires):
            executor.shutdown(wait=True)
        for saver in self._savers:
            saver.close()
        self._in_step.close()
        self._link.close()
        for pager in self._pagers:
            pager.close()

    @property
    def _pagers(self) -> list[Pager]:
        return [self._pager] if self._state_pager is None else [self._pager, self._state_pager]

    def _load(self, load: Load, begun: float) -> None:
        """``_bring``, as part of the request's trace."""
        with tracing.span("connector load", load.traceparent, request=load.request_id, blocks=len(load.keys)) as span:
            span.set(loaded=self._bring(load, begun))

    def _bring(self, load: Load, begun: float) -> int:
        """Copy block after block until one is missing; how many came. Never raises."""
        started = time.perf_counter()
        chunks = self._chunks(load)
        parts = [part for chunk in chunks for part in chunk.parts]
        good, miss = 0, None
        copying: deque[_Copying] = deque()
        try:
            for chunk, acquired in self._acquired(chunks, load.patience, begun):
                copying.append(self._begin_copy(chunk, acquired))
                miss = acquired.miss
                if len(copying) == COPIES_AHEAD:
                    good += self._end_copy(copying.popleft())
            while copying:
                good += self._end_copy(copying.popleft())
        except KVStoreError as error:
            miss = Miss.of(error)
            if miss is not Miss.DEADLINE:
                logger.warning("Request %s loads %d of %d blocks: %s", load.request_id, good, len(parts), error)
        except Exception:
            miss = Miss.UNAVAILABLE
            logger.exception("Loading KV of request %s failed after %d of %d blocks", load.request_id, good, len(parts))
        for unfinished in copying:
            _settle(unfinished.transfer)
            self._release(unfinished.chunk, unfinished.acquired)
        if good < len(parts):
            self._recorder.count("blocks_missed", len(parts) - good, (miss or Miss.NOT_STORED).value)
        self._recorder.count("load_seconds", time.perf_counter() - started)
        with self._load_ended:
            if self._geometry.whole and good < len(parts):
                self._failed.add(load.request_id)
            else:
                self._bad_pages.update(page for _, pages, _ in parts[good:] for page in pages)
            self._received.add(load.request_id)
            self._loading -= 1
            self._load_ended.notify()
        return good

    def _chunks(self, load: Load) -> list[_Chunk]:
        """The blocks of a load, and behind them their state."""
        parts = list(load.parts(self._geometry.pages_per_block, self._tables))
        chunks = [_Chunk(parts[at : at + LOAD_CHUNK], self._pager) for at in range(0, len(parts), LOAD_CHUNK)]
        if load.state is not None and self._state_pager is not None:
            chunks.append(_Chunk([(load.state.key, load.state.pages, 0)], self._state_pager))
        return chunks

    def _acquired(
        self, chunks: Sequence[_Chunk], patience: Patience, begun: float
    ) -> Iterator[tuple[_Chunk, Acquired]]:
        """Chunks with their slots, acquired one chunk ahead; the caller releases them. Ends after a miss.

        Each chunk has to be there when ``patience`` says so, counted from ``begun``.
        """

        def deadline() -> float:
            return begun + min(patience.seconds(asked), self._load_timeout)

        rest = iter(chunks)
        chunk = next(rest)
        asked = len(chunk.parts)
        acquired = self._acquire(chunk, deadline())  # here: until the first is there, handing it to a thread costs time
        ahead = None
        try:
            while True:
                if len(acquired.offsets) == len(chunk.parts) and (following := next(rest, None)):
                    asked += len(following.parts)
                    ahead = self._begin_acquire(following, deadline())
                yield chunk, acquired
                if ahead is None:
                    return
                (chunk, answer), ahead = ahead, None
                acquired = answer.result()
        finally:
            if ahead is not None:
                with suppress(KVStoreError):
                    self._release(ahead[0], ahead[1].result())

    def _begin_acquire(self, chunk: _Chunk, deadline: float) -> tuple[_Chunk, Future[Acquired]]:
        return chunk, self._acquires.submit(copy_context().run, self._acquire, chunk, deadline)

    def _acquire(self, chunk: _Chunk, deadline: float) -> Acquired:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the KV load took longer than it may")
        return self._client.acquire(chunk.keys, left)

    def _release(self, chunk: _Chunk, acquired: Acquired) -> None:
        with suppress(KVStoreError):  # a node that is gone holds no leases
            self._client.release(chunk.keys[: len(acquired.offsets)])

    def _begin_copy(self, chunk: _Chunk, acquired: Acquired) -> _Copying:
        copies = [
            BlockCopy(pages, offset, first)
            for (_, pages, first), offset in zip(chunk.parts, acquired.offsets, strict=False)
        ]
        try:
            with self._pager_lock:
                transfer = chunk.pager.load(acquired.arena, copies)
        except BaseException:
            self._release(chunk, acquired)
            raise
        return _Copying(chunk, acquired, copies, transfer)

    def _end_copy(self, copying: _Copying) -> int:
        """Wait for a copy and release its slots; how many blocks it brought."""
        try:
            copying.transfer.wait()
        finally:
            self._release(copying.chunk, copying.acquired)
        if copying.chunk.pager is self._pager:
            self._tally.loaded(copying.copies, copying.acquired.media)
        else:
            self._tally.state_loaded()
        return len(copying.copies)


def _settle(transfer: Transfer) -> None:
    """Wait for a transfer whose failure its own thread reports."""
    with suppress(Exception):
        transfer.wait()
