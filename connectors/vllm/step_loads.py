"""Loads within a step, on a worker: copies that the step's forward pass waits for on the device, and no thread.

The scheduler's side has leased the blocks and says where they lie (``connectors/vllm/in_step.py``), so nothing is asked of the
node. What cannot be handed over is bad in the results of the same step. A copy that fails afterwards was computed with; the
worker then saves nothing any more, since nobody knows what else is wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress

from connectors.paging.base import BlockCopy, Pager, Transfer
from connectors.vllm.keys import Geometry
from connectors.vllm.metrics import Recorder
from connectors.vllm.outbox import Outbox
from connectors.vllm.plan import Load, Told
from connectors.vllm.tally import Tally
from kvstore import tracing
from kvstore.errors import NodeUnavailable
from kvstore.node.api import Miss
from kvstore.node.arena import Arena

logger = logging.getLogger("vllm.kvstore")

SUSPECT_STEPS = 2
"""After a load that failed: the step itself, and the one that vLLM may have scheduled before it heard of it."""


class StepLoads:
    """Of one rank. The engine's thread makes all calls but ``prepared``, ``forget`` and ``trusted``."""

    def __init__(
        self,
        pager: Pager,
        pager_lock: threading.Lock,
        geometry: Geometry,
        recorder: Recorder,
        tally: Tally,
        outbox: Outbox,
    ) -> None:
        """``pager_lock`` is held while the pager loads."""
        self._pager = pager
        self._pager_lock = pager_lock
        self._geometry = geometry
        self._recorder = recorder
        self._tally = tally
        self._outbox = outbox
        self._arrivals = ThreadPoolExecutor(1, "kvstore-arrive")
        self._arena: Arena | None = None
        self._told_of = 0
        """Epoch of the last arena that the scheduler's side was told of: an arena kept for this would be freed, 0.2 s a GiB, by
        the engine's first step with the next one."""
        self._last: Future[None] | None = None
        self._suspect = 0
        self._broken = False

    def prepared(self, arena: Arena) -> None:
        """The pager has been shown the arena of the node's present run. Any thread."""
        self._arena = arena

    def forget(self) -> None:
        """No node answers. Any thread."""
        self._arena, self._told_of = None, 0

    def load(self, loads: Sequence[Load]) -> set[int]:
        """Before every step's forward pass: copy these requests' blocks; gives the pages that hold nothing good. Never raises."""
        self._suspect -= bool(self._suspect)
        if not loads:
            return set()
        begun = time.perf_counter()
        try:
            copies, transfer = self._begin(loads)
        except Exception:
            logger.exception("Loading within a step failed")
            self._recorder.count("blocks_missed", sum(len(load.keys) for load in loads), Miss.UNAVAILABLE.value)
            self._suspect = SUSPECT_STEPS
            self._outbox.tell(Told(in_step=True, failed=frozenset(load.request_id for load in loads)))
            return {page for load in loads for page in load.pages}
        self._outbox.tell(Told(in_step=True))
        self._last = self._arrivals.submit(self._arrive, loads, copies, transfer, begun)
        return set()

    @property
    def saving(self) -> bool:
        """Whether what this step computes may be saved."""
        return not self._suspect and not self._broken

    @property
    def last(self) -> Future[None] | None:
        """The loads of the last step that had any: done when they have arrived."""
        return self._last

    def trusted(self, loads: Future[None] | None) -> bool:
        """Whether what was computed behind ``loads`` (a ``last``) may be published; waits for their copies. Any thread."""
        if loads is not None:
            loads.result()
        return not self._broken

    def tell_ready(self) -> None:
        """Tell, once, that the arena of the node's present run is prepared."""
        arena = self._arena
        if arena is not None and arena.epoch != self._told_of and self._pager.ready(arena):
            self._told_of = arena.epoch
            self._outbox.tell(Told(ready=Counter({arena.epoch: 1})))

    def close(self) -> None:
        self._arrivals.shutdown(wait=True)

    def _begin(self, loads: Sequence[Load]) -> tuple[list[BlockCopy], Transfer]:
        """Hand the copies of all requests over, and have the engine's device wait for them."""
        arena = self._arena
        copies = []
        for load in loads:
            if arena is None or load.slots is None or load.slots.epoch != arena.epoch:
                raise NodeUnavailable("the node was restarted meanwhile")
            parts = load.parts(self._geometry.pages_per_block)
            copies += [
                BlockCopy(pages, at, first) for (_, pages, first), at in zip(parts, load.slots.offsets, strict=True)
            ]
        assert arena is not None
        with self._pager_lock:
            transfer = self._pager.load(arena, copies)
        try:
            transfer.precede()
        except BaseException:
            with suppress(Exception):  # a part of it may be on its way into pages that are computed again
                transfer.wait()
            raise
        return copies, transfer

    def _arrive(self, loads: Sequence[Load], copies: Sequence[BlockCopy], transfer: Transfer, begun: float) -> None:
        """Wait for the copies and count them. Runs in its own thread; never raises."""
        with ExitStack() as spans:
            for load in loads:
                name, blocks = load.request_id, len(load.keys)
                span = tracing.span("connector load", load.traceparent, request=name, blocks=blocks, in_step=True)
                spans.enter_context(span).set(loaded=blocks)
            try:
                transfer.wait()
            except Exception:
                self._broken = True
                names = ", ".join(load.request_id for load in loads)
                logger.exception(
                    "KV of requests %s did not arrive, but was computed with: nothing is saved any more", names
                )
                self._recorder.count("blocks_missed", len(copies), Miss.UNAVAILABLE.value)
                self._outbox.tell(Told(failed=frozenset(load.request_id for load in loads)))
                return
        seconds = time.perf_counter() - begun
        nbytes = self._tally.loaded(copies, [medium for load in loads if load.slots for medium in load.slots.media])
        self._recorder.count("load_seconds", seconds)
        self._outbox.tell(Told(arrived=1, arrived_bytes=nbytes * self._geometry.parts, arrived_seconds=seconds))
