"""Loads within the step that computes with them, on the scheduler's side: when, and with what held in memory.

A load beside the steps costs its request an empty step and the wait for the next one. Within a step the engine is launched while
its blocks are still on the bus. It then waits for them, with all that it computes, so nobody else may be computed on.

Nor may such a load fail. vLLM takes back what was computed from pages that turn out bad, but loses track of what it has
scheduled meanwhile (vLLM issue 49250: wrong tokens with asynchronous scheduling, and with the second model runner). So blocks are
leased before vLLM is told of them, and stay so until the results of the step are there: nothing is left that the workers would
have to ask the node. All calls come from vLLM's scheduler thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from connectors.link import Link
from connectors.vllm.plan import Slots, Told
from kvstore import tracing
from kvstore.errors import KVStoreError
from kvstore.identity import BlockKey
from kvstore.tiers.base import Medium

IN_STEP_SECONDS = 0.1
"""That a step may wait for its loads: whoever comes next waits as long. A prefill step of 8k tokens takes twice that."""

MOST_EPOCHS = 4
"""Runs of the node of which is remembered who prepared their arena."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What decides besides the blocks themselves."""

    others: int
    """Requests that earlier steps computed on and that have not finished."""
    seconds: float
    """Until all that this step would load has arrived."""
    ready: bool
    """Every rank can copy from the arena at once."""
    windowed: bool
    """Of several page tables vLLM cannot be told which pages are bad."""


def fits(media: Collection[Medium], now: Situation) -> bool:
    """Whether to load within the step."""
    alone = not now.others and not now.windowed
    return alone and now.ready and set(media) == {Medium.HOST} and now.seconds <= IN_STEP_SECONDS


class Holder:
    """Leases on blocks that are offered for, or loaded in, a step."""

    def __init__(self, link: Link, ranks: int) -> None:
        self._link = link
        self._ranks = ranks
        self._ready: Counter[int] = Counter()
        self._offered: dict[str, Sequence[BlockKey]] = {}
        self._admitted: list[Sequence[BlockKey]] = []
        self._steps: deque[list[Sequence[BlockKey]]] = deque()
        """What each step computes with whose results are not there yet."""

    @property
    def ready(self) -> bool:
        """Whether every rank has prepared the arena of the node's present run."""
        return self._ready[self._link.client.epoch] >= self._ranks

    def hold(self, request_id: str, keys: Sequence[BlockKey], trace: str = "") -> Slots | None:
        """Lease blocks that are all in memory. None, and nothing held, when they are not, or no node answers."""
        self.drop(request_id)
        try:
            with tracing.span("connector hold", trace, request=request_id, blocks=len(keys)) as span:
                acquired = self._link.client.acquire(keys, 0.0)
                span.set(held=len(acquired.offsets))
        except KVStoreError:
            self._link.lost()
            return None
        got = keys[: len(acquired.offsets)]
        if len(got) < len(keys) or self._ready[acquired.arena.epoch] < self._ranks:
            self._release(got)
            return None
        self._offered[request_id] = keys
        return Slots(acquired.arena.epoch, acquired.offsets, acquired.media)

    def drop(self, request_id: str) -> None:
        """The request does not load what is held for it."""
        self._release(self._offered.pop(request_id, ()))

    def admit(self, request_id: str) -> None:
        """The step that is being scheduled loads what is held for the request."""
        self._admitted.append(self._offered.pop(request_id))

    def step(self) -> None:
        """A step has been scheduled; what was offered and not taken is let go."""
        for request_id in list(self._offered):
            self.drop(request_id)
        if self._admitted:
            self._steps.append(self._admitted)
            self._admitted = []

    def heard(self, told: Told) -> None:
        """The results of a step are there, and so is what the workers told with them."""
        for epoch, ranks in told.ready.items():
            self._ready[epoch] += ranks
        while len(self._ready) > MOST_EPOCHS:
            del self._ready[next(iter(self._ready))]
        if told.failed:  # what fails without the node may fail again: no more of this until a node is found anew
            self._ready.clear()
        if told.in_step and self._steps:
            for keys in self._steps.popleft():
                self._release(keys)

    def _release(self, keys: Sequence[BlockKey]) -> None:
        if keys:
            with suppress(KVStoreError):  # a node that is gone holds no leases
                self._link.client.release(keys)
