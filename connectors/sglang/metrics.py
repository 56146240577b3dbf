"""Counters of the backend: for SGLang's own storage metrics, and by reason as ``sglang:kvstore_*`` in its ``/metrics``."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from prometheus_client import Counter

from connectors.sglang.compat import StorageMetrics

_GIB = float(1 << 30)

COUNTERS = {
    "pages_missed": "Pages asked for and not delivered, by reason.",
    "pages_not_saved": "Pages handed over and not stored, by reason.",
    "bytes_loaded": "KV bytes copied from the store, by host pool.",
    "bytes_saved": "KV bytes copied to the store, by host pool.",
}


@cache
def _counter(name: str) -> Any:
    """One for the life of the process: a backend may be attached again. In the directory of SGLang's own metrics, if any."""
    label = "reason" if name.startswith("pages") else "pool"
    return Counter(f"sglang:kvstore_{name}", COUNTERS[name], [label])


class Recorder:
    """Collects counts from any thread until SGLang asks for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = StorageMetrics()
        self.counts: dict[str, int] = {}
        """Everything counted so far, as ``name:label``."""

    def count(self, name: str, label: str, value: int = 1) -> None:
        """Add to a counter of ``COUNTERS``. Adding 0 leaves no trace."""
        if value:
            with self._lock:
                self.counts[f"{name}:{label}"] = self.counts.get(f"{name}:{label}", 0) + value
            _counter(name).labels(label).inc(value)

    def loaded(self, pages: int, nbytes: int, seconds: float) -> None:
        """One call's pages that arrived."""
        with self._lock:
            self._stats.prefetch_pgs.append(pages)
            self._stats.prefetch_bandwidth.append(nbytes / _GIB / max(seconds, 1e-9))

    def saved(self, pages: int, nbytes: int, seconds: float) -> None:
        """One call's pages that were stored by it."""
        with self._lock:
            self._stats.backup_pgs.append(pages)
            self._stats.backup_bandwidth.append(nbytes / _GIB / max(seconds, 1e-9))

    def take(self) -> Any:
        """SGLang's ``StorageMetrics`` since the last call: pages, and GiB/s, of each call."""
        with self._lock:
            stats, self._stats = self._stats, StorageMetrics()
        return stats
