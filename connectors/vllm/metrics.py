"""Counters of the connector, in vLLM's own metrics (``/metrics``, ``LLM.get_metrics()``).

A counter's value travels as ``name`` or ``name:label`` in ``KVConnectorStats.data``; engines and ranks add up.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

PREFIX = "vllm:kvstore_"

COUNTERS = {
    "tokens_offered": ("Prompt tokens that the store offered to the scheduler.", None),
    "tokens_loaded": ("Tokens whose KV was loaded instead of computed, by the medium it came from.", "medium"),
    "tokens_saved": ("Tokens whose KV was published in the store.", None),
    "loads": ("Loads begun: within the step that computes with them, or beside the steps.", "way"),
    "bytes_loaded": ("KV bytes copied from the store, all ranks.", None),
    "bytes_saved": ("KV bytes copied to the store, all ranks.", None),
    "load_seconds": ("Seconds from the start of a load to its end, summed over loads and ranks.", None),
    "save_seconds": ("Seconds that saving kept the engine waiting, summed over steps and ranks.", None),
    "blocks_recomputed": (
        "Stored blocks that were computed because that was planned to be faster, by reason.",
        "reason",
    ),
    "blocks_missed": ("Blocks wanted and not delivered, by reason.", "reason"),
    "blocks_not_saved": ("Blocks computed and not stored by this engine, by reason.", "reason"),
}
"""Name: (help, name of the extra label)."""


class Stats(KVConnectorStats):  # type: ignore[misc]
    """What was counted since the last report."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> Stats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 4) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class Recorder:
    """Collects counts from any thread until vLLM asks for them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter of ``COUNTERS``. Adding 0 leaves no trace."""
        if value:
            with self._lock:
                self._counts[f"{name}:{label}" if label else name] += value  # type: ignore[assignment]

    def take(self) -> Stats | None:
        """What was counted since the last call; None if nothing was."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return Stats(data=dict(counts)) if counts else None


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Shows the counters as ``vllm:kvstore_<name>_total``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {
            name: self._counter_cls(
                name=PREFIX + name, documentation=text, labelnames=labelnames + ([label] if label else [])
            )
            for name, (text, label) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            base, _, label = name.partition(":")
            values = [*self.per_engine_labelvalues[engine_idx], *([label] if label else [])]
            self._metrics[base].labels(*values).inc(value)
