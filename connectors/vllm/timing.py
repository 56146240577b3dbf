"""What an engine's steps and loads take, as its scheduler sees them; reported to the node, which plans loads by it.

A step's time is from ``build_connector_meta``, which ends the scheduling of the step, or from the end of the step before it
when that is later (with asynchronous scheduling a step is scheduled while the last one runs), to ``update_connector_output``,
with which vLLM processes the step's results, sampling included. Both are called for every step that computes something, in
order, by all of vLLM 0.26 to 0.33, whichever model runner is used; request metrics know only whole requests, which share
their steps with others. The tokens of all requests of a step are counted, so batches, chunks and decoding beside a prefill
are no error but what is measured. vLLM's own time between two steps is not part of it.

A load's time is taken by the worker and comes with the worker's counters; only loads from the arena that end alone in a step
are told apart from others, and are reported. What the loads within a step take, all of them together, the worker tells apart.
A step that waits for loads says nothing of how fast the engine computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from connectors.link import Link
from connectors.vllm.plan import Told
from kvstore.policy.fit import OnlineFit
from kvstore.policy.prefill import LEAST_TOKENS, attention
from kvstore.tiers.base import Medium

CAUTIOUS = (0.001, 1 / 10e9)
"""Seconds of a load from the arena, and of each of its bytes, until some were measured. PCIe 5 does five times as much."""

MEMORY = 200.0
"""Loads."""

MOST_STEPS = 64
"""Steps under way. More are not: results that never came are forgotten."""


class Timing:
    """All calls come from vLLM's scheduler thread."""

    def __init__(self, link: Link, ranks: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._link = link
        self._ranks = ranks
        self._clock = clock
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=MOST_STEPS)
        self._ended = 0.0
        self._loads: dict[str, int] = {}
        self._speed = OnlineFit(CAUTIOUS, MEMORY)

    def load_seconds(self, nbytes: int) -> float:
        """What a load of so many bytes, all in the arena, will take by those seen so far."""
        return self._speed.seconds((1.0, nbytes))

    def scheduled(self, chunks: Iterable[tuple[int, int]], loading: bool = False) -> None:
        """A step begins that computes these: for each request the tokens that it has, and the tokens to compute.

        ``loading``: it waits for loads first.
        """
        tokens, pairs = 0, 0.0
        for computed, count in chunks:
            tokens += count
            pairs += attention(computed, count)
        if tokens:
            self._steps.append((self._clock(), 0 if loading else tokens, pairs))

    def loading(self, request_id: str, nbytes: int, media: Iterable[Medium]) -> None:
        """A request begins to load so many bytes."""
        if set(media) == {Medium.HOST}:
            self._loads[request_id] = nbytes

    def ended(self, output: Any) -> None:
        """The results of the oldest step are here: vLLM's KVConnectorOutput of it."""
        now = self._clock()
        received = output.finished_recving or set()
        loads = [nbytes for name in received if (nbytes := self._loads.pop(name, 0))]
        stats = output.kv_connector_stats
        if len(received) == 1 and loads and not output.invalid_block_ids and stats is not None:
            self._loaded(loads[0], stats.data.get("load_seconds", 0.0) / self._ranks)
        told = output.kv_connector_worker_meta
        if isinstance(told, Told) and told.arrived:
            self._loaded(told.arrived_bytes // told.arrived, told.arrived_seconds / told.arrived)
        if self._steps:
            begun, tokens, pairs = self._steps.popleft()
            if tokens >= LEAST_TOKENS:
                self._link.report_step(tokens, pairs, now - max(begun, self._ended))
        self._ended = now

    def _loaded(self, nbytes: int, seconds: float) -> None:
        self._speed.observe((1.0, nbytes), seconds)
        self._link.report_load(nbytes, seconds)
