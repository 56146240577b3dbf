"""The worker's side: moves the bytes of one rank, following the scheduler's plan.

Threads: the engine's thread makes all calls. Loads run in threads of their own, one acquiring ahead while another copies;
reserving and publishing saves have one thread each. The pager loads under a lock. Loads within a step are
``step_loads.py``.

What the engine waits for is bounded. A reservation is asked for before the forward pass and used after it; one that is late
is given up, and while it is, or while too many blocks wait to be published, saves are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass

from connectors.link import Link
from connectors.paging.base import BlockCopy, Pager, Transfer
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Load, Save, Told
from connectors.vllm.step_loads import StepLoads
from connectors.vllm.tally import Tally
from kvstore import tracing
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.identity import BlockKey
from kvstore.node.api import Acquired, Miss, Reserved
from kvstore.policy.planner import Patience

logger = logging.getLogger("vllm.kvstore")

LoadPart = tuple[BlockKey, tuple[int, ...], int]
"""A block's key, the pages to fill, and the page of the block at which they start."""

LOAD_CHUNK = 16
"""Blocks acquired at a time: enough to hide the round trip, few enough to leave the arena to others."""

COPIES_AHEAD = 2
"""Chunks of a load handed to the pager at a time: the bus does not wait while a thread hears of the end of one."""

CONCURRENT_LOADS = 2

RESERVE_TIMEOUT = 1.0
RESERVATION_WAIT = 0.05
"""Seconds that the engine waits after a step for a reservation that was asked for before it."""

MAX_UNPUBLISHED = 1024
"""Blocks saved but not published yet, beyond which saves are dropped."""

PREPARE_TIMEOUT = 5.0
PUBLISH_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class _Copying:
    """A chunk of a load on its way into the pages."""

    chunk: Sequence[LoadPart]
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
        self, link: Link, pager: Pager, geometry: Geometry, rank: int, recorder: Recorder, load_timeout: float
    ) -> None:
        self._link = link
        self._client = link.client
        self._pager = pager
        self._geometry = geometry
        self._part = geometry.part(rank)
        self._tables = len(geometry.tables.windows)
        self._tally = Tally(geometry, rank, recorder)
        self._recorder = recorder
        self._load_timeout = load_timeout
        self._pager_lock = threading.Lock()
        self._in_step = StepLoads(pager, self._pager_lock, geometry, recorder, self._tally)
        self._loads = ThreadPoolExecutor(CONCURRENT_LOADS, "kvstore-load")
        self._acquires = ThreadPoolExecutor(CONCURRENT_LOADS, "kvstore-acquire")
        self._reserves = ThreadPoolExecutor(1, "kvstore-reserve")
        self._publishes = ThreadPoolExecutor(1, "kvstore-publish")
        self._reserving: tuple[Future[Reserved | None], Sequence[Save]] | None = None
        self._copying: list[tuple[frozenset[int], Transfer]] = []
        self._lock = threading.Lock()
        self._load_ended = threading.Condition(self._lock)
        self._loading = 0
        self._unpublished = 0
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._just_ended = False
        self._bad_pages: set[int] = set()
        link.on_node(self._prepare)

    def _prepare(self) -> None:
        """Show the pager a node's arena before it is needed: pinning it takes seconds."""
        arena = self._client.acquire([], PREPARE_TIMEOUT).arena
        with self._pager_lock:
            self._pager.load(arena, [])
        self._in_step.prepared(arena)

    # Saves

    def protect(self, pages: frozenset[int]) -> None:
        """Before ``pages`` are overwritten: wait for copies out of them."""
        pending = []
        for source, transfer in self._copying:
            if not source.isdisjoint(pages):
                _settle(transfer)
            elif not transfer.done():
                pending.append((source, transfer))
        self._copying = pending

    def begin_saves(self, saves: Sequence[Save]) -> None:
        """Every step, before its forward pass: ask for slots, while the engine computes what goes there."""
        self._pager.follow()
        if not saves or self._part is None:
            return
        if self._reserving is not None or self._unpublished + len(saves) > MAX_UNPUBLISHED:
            self._drop(saves, "busy")
            return
        self._reserving = self._reserves.submit(self._reserve, saves), saves

    def finish_saves(self) -> None:
        """After the forward pass: copy what ``begin_saves`` got slots for, and leave publishing to its thread."""
        if self._reserving is None:
            return
        started = time.perf_counter()
        answer, saves = self._reserving
        try:
            reserved = answer.result(RESERVATION_WAIT)
        except FutureTimeout:
            self._drop(saves, "late")
            answer.add_done_callback(lambda late: self._give_up(late.result(), saves))
            reserved = None
        self._reserving = None
        if reserved is not None and not self._in_step.saving:
            self._drop(saves, "load_failed")
            self._publishes.submit(self._give_up, reserved, saves)
        elif reserved is not None:
            self._copy_out(reserved, saves)
        self._recorder.count("save_seconds", time.perf_counter() - started)

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
        return self._in_step.take_told()

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
        for executor in (self._loads, self._acquires, self._reserves, self._publishes):
            executor.shutdown(wait=True)
        self._in_step.close()
        self._link.close()
        self._pager.close()

    def _load(self, load: Load, begun: float) -> None:
        """``_bring``, as part of the request's trace."""
        with tracing.span("connector load", load.traceparent, request=load.request_id, blocks=len(load.keys)) as span:
            span.set(loaded=self._bring(load, begun))

    def _bring(self, load: Load, begun: float) -> int:
        """Copy block after block until one is missing; how many came. Never raises."""
        started = time.perf_counter()
        parts = list(load.parts(self._geometry.pages_per_block, self._tables))
        good, miss = 0, None
        copying: deque[_Copying] = deque()
        try:
            for chunk, acquired in self._acquired(parts, load.patience, begun):
                copying.append(self._begin_copy(chunk, acquired))
                miss = acquired.miss
                if len(copying) == COPIES_AHEAD:
                    good += self._end_copy(copying.popleft())
            while copying:
                good += self._end_copy(copying.popleft())
        except DeadlineExceeded:
            miss = Miss.DEADLINE
        except KVStoreError as error:
            miss = Miss.UNAVAILABLE
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
            if self._geometry.tables.windowed and good < len(parts):
                self._failed.add(load.request_id)
            else:
                self._bad_pages.update(page for _, pages, _ in parts[good:] for page in pages)
            self._received.add(load.request_id)
            self._loading -= 1
            self._load_ended.notify()
        return good

    def _acquired(
        self, parts: Sequence[LoadPart], patience: Patience, begun: float
    ) -> Iterator[tuple[Sequence[LoadPart], Acquired]]:
        """Chunks with their slots, acquired one chunk ahead; the caller releases them. Ends after a miss.

        Each chunk has to be there when ``patience`` says so, counted from ``begun``.
        """

        def deadline() -> float:
            return begun + min(patience.seconds(asked), self._load_timeout)

        asked = min(LOAD_CHUNK, len(parts))
        chunks = iter([parts[at : at + LOAD_CHUNK] for at in range(0, len(parts), LOAD_CHUNK)])
        chunk = next(chunks)
        acquired = self._acquire(chunk, deadline())  # here: until the first is there, handing it to a thread costs time
        ahead = None
        try:
            while True:
                if len(acquired.offsets) == len(chunk) and (following := next(chunks, None)):
                    asked += len(following)
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

    def _begin_acquire(self, chunk: Sequence[LoadPart], deadline: float) -> tuple[Sequence[LoadPart], Future[Acquired]]:
        return chunk, self._acquires.submit(copy_context().run, self._acquire, chunk, deadline)

    def _acquire(self, chunk: Sequence[LoadPart], deadline: float) -> Acquired:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the KV load took longer than it may")
        return self._client.acquire([key for key, _, _ in chunk], left)

    def _release(self, chunk: Sequence[LoadPart], acquired: Acquired) -> None:
        with suppress(KVStoreError):  # a node that is gone holds no leases
            self._client.release([key for key, _, _ in chunk[: len(acquired.offsets)]])

    def _begin_copy(self, chunk: Sequence[LoadPart], acquired: Acquired) -> _Copying:
        copies = [
            BlockCopy(pages, offset, first) for (_, pages, first), offset in zip(chunk, acquired.offsets, strict=False)
        ]
        try:
            with self._pager_lock:
                transfer = self._pager.load(acquired.arena, copies)
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
        self._tally.loaded(copying.copies, copying.acquired.media)
        return len(copying.copies)

    def _reserve(self, saves: Sequence[Save]) -> Reserved | None:
        """Slots for the blocks; None, counted, when the node does not give any. Runs in the reserving thread."""
        geometry = self._geometry
        if self._link.keyring is None:
            self._drop(saves, "unavailable")
            return None
        try:
            return self._client.reserve(
                geometry.namespace, [save.block for save in saves], self._part or 0, geometry.parts, RESERVE_TIMEOUT
            )
        except DeadlineExceeded:
            self._drop(saves, "deadline")
        except KVStoreError:
            self._link.lost()
            self._drop(saves, "unavailable")
        except Exception:
            logger.exception("Reserving slots failed")
            self._drop(saves, "unavailable")
        return None

    def _give_up(self, reserved: Reserved | None, saves: Sequence[Save]) -> None:
        if reserved is not None:
            self._abort([save.block.key for save, at in zip(saves, reserved.offsets, strict=True) if at is not None])

    def _copy_out(self, reserved: Reserved, saves: Sequence[Save]) -> None:
        for miss in reserved.misses.values():
            self._recorder.count("blocks_not_saved", label=miss.value)
        wanted = [(save, at) for save, at in zip(saves, reserved.offsets, strict=True) if at is not None]
        if not wanted:
            return
        copies = [BlockCopy(save.pages, at) for save, at in wanted]
        keys = [save.block.key for save, _ in wanted]
        try:
            transfer = self._pager.save(reserved.arena, copies)
        except Exception:
            logger.exception("Saving %d blocks failed", len(wanted))
            self._publishes.submit(self._abort, keys)
            return
        if not transfer.done():
            self._copying.append((frozenset(page for copy in copies for page in copy.pages), transfer))
        with self._lock:
            self._unpublished += len(keys)
        trace = next((save.traceparent for save, _ in wanted if save.traceparent), "")
        self._publishes.submit(self._publish, keys, transfer, trace, self._in_step.last)

    def _publish(self, keys: Sequence[BlockKey], transfer: Transfer, trace: str, behind: Future[None] | None) -> None:
        """Runs in the publishing thread. ``trace`` is that of the first request of the step that has one, ``behind`` the last
        loads that a step waited for."""
        published: Sequence[BlockKey] = ()
        try:
            with tracing.span("connector save", trace, blocks=len(keys)):
                transfer.wait()
                if not self._in_step.trusted(behind):
                    raise RuntimeError("they were computed with KV that did not arrive")
                published = self._client.commit(keys, self._part or 0, timeout=PUBLISH_TIMEOUT)
            self._recorder.count("bytes_saved", len(keys) * self._tally.block_bytes)
        except KVStoreError:
            self._recorder.count("blocks_not_saved", len(keys), "unpublished")
        except Exception:
            logger.exception("Saving %d blocks failed", len(keys))
            self._recorder.count("blocks_not_saved", len(keys), "unpublished")
            self._abort(keys)
        with self._lock:
            self._unpublished -= len(keys)
        # A block is published by the last of its parts, so only one rank counts its tokens.
        self._recorder.count("tokens_saved", len(published) * self._geometry.block_tokens)

    def _abort(self, keys: Sequence[BlockKey]) -> None:
        with suppress(KVStoreError):  # a node that is gone holds no reservations
            self._client.abort(keys)

    def _drop(self, saves: Sequence[Save], reason: str) -> None:
        self._recorder.count("blocks_not_saved", len(saves), reason)


def _settle(transfer: Transfer) -> None:
    """Wait for a transfer whose failure its own thread reports."""
    with suppress(Exception):
        transfer.wait()
