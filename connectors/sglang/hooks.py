"""What the storage interface does not say: how fast SGLang computes, how many requests wait, and which of them asks.

SGLang calls ``register`` as a plugin (entry point ``sglang.srt.plugins``) in each of its processes. In the scheduler's, where the
backend is, it hooks three methods and changes nothing of what they do. Where SGLang has no plugins, or is told to load others
only (``SGLANG_PLUGINS``), the backend works without: then everything stored is loaded, and no request has a name.

A step's time is from ``run_batch``, or from the end of the step before it when that is later (with overlapped scheduling a step
is launched while the last one runs), to the end of ``process_batch_result``. Both are called for every step, in order.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from connectors.link import Link
from kvstore.policy.prefill import LEAST_TOKENS, attention

logger = logging.getLogger("kvstore")

MOST_STEPS = 64
"""Steps under way. More are not: results that never came are forgotten."""

_SCHEDULER = "sglang.srt.managers.scheduler"
_CONTROLLERS = (
    ("sglang.srt.managers.cache_controller", "HiCacheController"),
    ("sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller", "HybridCacheController"),
)
_LOOKUP = "_storage_hit_query"


class Observer:
    """What is known of this process's scheduler. Its thread tells of steps; SGLang's storage threads ask."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._link: Link | None = None
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=MOST_STEPS)
        self._ended = 0.0
        self._thread = threading.local()
        self.waiting: int | None = None
        """Requests that wait besides the one that asks, when the last step began; None before the first step."""

    def watch(self, link: Link | None) -> None:
        """Report steps to the node of ``link`` from now on; None: to nobody."""
        self._link = link
        self._steps.clear()
        self.waiting = None

    @property
    def request(self) -> str:
        """Id of the request that the calling thread asks for; empty when it is not known."""
        return getattr(self._thread, "request", "")

    @contextmanager
    def asking(self, request: str) -> Iterator[None]:
        """Around a lookup of the calling thread."""
        self._thread.request = request
        try:
            yield
        finally:
            self._thread.request = ""

    def begun(self, scheduler: Any, batch: Any) -> None:
        """A step begins: SGLang's ``ScheduleBatch``, of which a prefill names the tokens it has and those to compute."""
        if self._link is None:
            return
        tokens, pairs = 0, 0.0
        if batch.forward_mode.is_extend():
            for computed, count in zip(batch.prefix_lens or (), batch.extend_lens or (), strict=False):
                tokens += count
                pairs += attention(computed, count)
        self._steps.append((self._clock(), tokens, pairs))
        self.waiting = max(len(scheduler.waiting_queue) - 1, 0)

    def ended(self) -> None:
        """The results of the oldest step are processed."""
        now = self._clock()
        if self._steps:
            begun, tokens, pairs = self._steps.popleft()
            if tokens >= LEAST_TOKENS and self._link is not None:
                self._link.report_step(tokens, pairs, now - max(begun, self._ended))
        self._ended = now


OBSERVER = Observer()
"""Of this process: SGLang has one scheduler in each."""


def register() -> None:
    """Hook this process's scheduler, if it has one. Called by SGLang before it starts."""
    if _SCHEDULER not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_SCHEDULER}.Scheduler.run_batch", _run_batch, HookType.BEFORE)
    HookRegistry.register(f"{_SCHEDULER}.Scheduler.process_batch_result", _process_batch_result, HookType.AFTER)
    for module, name in _CONTROLLERS:
        try:
            controller = getattr(import_module(module), name, None)
        except ImportError:
            continue
        if controller is not None and _LOOKUP in vars(controller):
            HookRegistry.register(f"{module}.{name}.{_LOOKUP}", _storage_hit_query, HookType.AROUND)


def _run_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    try:
        OBSERVER.begun(scheduler, batch)
    except Exception:  # a version of SGLang that we do not know: no reason to disturb it
        OBSERVER.watch(None)
        logger.exception("KV store: steps of this SGLang are not understood, so loads are not planned")


def _process_batch_result(*_: Any, **__: Any) -> None:
    OBSERVER.ended()


def _storage_hit_query(lookup: Callable[..., Any], controller: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    with OBSERVER.asking(str(getattr(operation, "request_id", ""))):
        return lookup(controller, operation, *args, **kwargs)
