"""Saving on a worker: one rank's share of each block that a step completes, out of the engine's pages into the store.

Threads: the engine's thread makes all calls; reserving and publishing have one thread each.

What the engine waits for is bounded. A reservation is asked for before the forward pass and used after it. One that is late is
given up, and no other is asked for until the node has answered the link; then, and while too many blocks wait to be published,
saves are dropped and counted. The scheduler's side hears of them, and offers them again when a request comes across them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress

from connectors.link import Link
from connectors.paging.base import BlockCopy, Pager, Transfer
from connectors.vllm.metrics import Recorder
from connectors.vllm.outbox import Outbox
from connectors.vllm.plan import Save, Told
from connectors.vllm.share import Share
from connectors.vllm.step_loads import StepLoads
from kvstore import tracing
from kvstore.errors import KVStoreError
from kvstore.identity import BlockKey
from kvstore.node.api import Miss, Reserved

logger = logging.getLogger("vllm.kvstore")

RESERVE_TIMEOUT = 1.0
RESERVATION_WAIT = 0.05
"""Seconds that the engine waits after a step for a reservation that was asked for before it."""

MAX_UNPUBLISHED = 1024
"""Blocks saved but not published yet, beyond which saves are dropped."""

PUBLISH_TIMEOUT = 10.0


class Saver:
    """Saves blocks of one namespace for one rank."""

    def __init__(
        self, link: Link, pager: Pager, share: Share, recorder: Recorder, in_step: StepLoads, outbox: Outbox
    ) -> None:
        """``in_step`` says whether what a step computed may be saved."""
        self._link = link
        self._client = link.client
        self._pager = pager
        self._share = share
        self._recorder = recorder
        self._in_step = in_step
        self._outbox = outbox
        self._reserves = ThreadPoolExecutor(1, "kvstore-reserve")
        self._publishes = ThreadPoolExecutor(1, "kvstore-publish")
        self._reserving: tuple[Future[Reserved | str], Sequence[Save]] | None = None
        self._copying: list[tuple[frozenset[int], Transfer]] = []
        self._lock = threading.Lock()
        self._unpublished = 0

    def protect(self, pages: frozenset[int]) -> None:
        """Before ``pages`` are overwritten: wait for copies out of them."""
        pending = []
        for source, transfer in self._copying:
            if not source.isdisjoint(pages):
                with suppress(Exception):  # a failure is reported by the thread that publishes
                    transfer.wait()
            elif not transfer.done():
                pending.append((source, transfer))
        self._copying = pending

    def begin(self, saves: Sequence[Save]) -> None:
        """Every step, before its forward pass: ask for slots, while the engine computes what goes there."""
        self._pager.follow()
        if not saves or self._share.part is None:
            return
        if self._link.keyring is None:
            self._drop(_keys(saves), "unavailable")
            return
        if self._reserving is not None or self._unpublished + len(saves) > MAX_UNPUBLISHED:
            self._drop(_keys(saves), "busy")
            return
        self._reserving = self._reserves.submit(self._reserve, saves), saves

    def finish(self) -> None:
        """After the forward pass: copy what ``begin`` got slots for, and leave publishing to its thread."""
        if self._reserving is None:
            return
        started = time.perf_counter()
        answer, saves = self._reserving
        try:
            reserved = answer.result(RESERVATION_WAIT)
        except FutureTimeout:
            self._link.lost()
            answer.add_done_callback(lambda late: self._give_up(late.result(), saves))
            reserved = "late"
        self._reserving = None
        if isinstance(reserved, str):
            self._drop(_keys(saves), reserved)
        elif not self._in_step.saving:
            self._recorder.count("blocks_not_saved", len(saves), "load_failed")
            self._publishes.submit(self._give_up, reserved, saves)
        else:
            self._copy_out(reserved, saves)
        self._recorder.count("save_seconds", time.perf_counter() - started)

    def close(self) -> None:
        """Finish what was started, within its deadlines."""
        for executor in (self._reserves, self._publishes):
            executor.shutdown(wait=True)

    def _reserve(self, saves: Sequence[Save]) -> Reserved | str:
        """Slots for the blocks, or why there are none. Runs in the reserving thread."""
        share = self._share
        try:
            return self._client.reserve(
                share.namespace, [save.block for save in saves], share.part or 0, share.parts, RESERVE_TIMEOUT
            )
        except KVStoreError as error:
            self._link.lost()
            return Miss.of(error).value
        except Exception:
            logger.exception("Reserving slots failed")
            return "unavailable"

    def _give_up(self, reserved: Reserved | str, saves: Sequence[Save]) -> None:
        if not isinstance(reserved, str):
            self._abort([save.block.key for save, at in zip(saves, reserved.offsets, strict=True) if at is not None])

    def _copy_out(self, reserved: Reserved, saves: Sequence[Save]) -> None:
        for miss in reserved.misses.values():
            self._recorder.count("blocks_not_saved", label=miss.value)
        wanted = [(save, at) for save, at in zip(saves, reserved.offsets, strict=True) if at is not None]
        if not wanted:
            return
        copies = [BlockCopy(save.pages, at) for save, at in wanted]
        keys = _keys([save for save, _ in wanted])
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
                published = self._client.commit(keys, self._share.part or 0, timeout=PUBLISH_TIMEOUT)
            self._recorder.count("bytes_saved", len(keys) * self._share.nbytes)
        except KVStoreError:
            self._drop(keys, "unpublished")
        except Exception:
            logger.exception("Saving %d blocks failed", len(keys))
            self._recorder.count("blocks_not_saved", len(keys), "unpublished")
            self._abort(keys)
        with self._lock:
            self._unpublished -= len(keys)
        # A block is published by the last of its parts, so only one rank counts its tokens.
        self._recorder.count("tokens_saved", len(published) * self._share.tokens)

    def _abort(self, keys: Sequence[BlockKey]) -> None:
        with suppress(KVStoreError):  # a node that is gone holds no reservations
            self._client.abort(keys)

    def _drop(self, keys: Sequence[BlockKey], reason: str) -> None:
        self._recorder.count("blocks_not_saved", len(keys), reason)
        self._outbox.tell(Told(dropped=frozenset(keys)))


def _keys(saves: Sequence[Save]) -> list[BlockKey]:
    return [save.block.key for save in saves]
