"""The store as a secondary tier of vLLM's own OffloadingConnector, for those who keep vLLM's GPU path.

``"secondary_tiers": [{"type": "KVStoreTier", "module_path": "connectors.vllm.tier"}]`` in ``kv_connector_extra_config``.

vLLM moves pages between the GPU and its CPU tier; this moves rows of the CPU tier to and from the node. Rows are vLLM's own
bytes under vLLM's own block hashes, so they are opaque: no other engine reads them, and another TP degree does only where vLLM
says that they do not depend on it.

Interface of vLLM 0.32 and 0.33 (``vllm/v1/kv_offload/tiering/base.py``). vLLM calls everything from its scheduler thread.
"""

from __future__ import annotations

import hashlib
import json
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.version import __version_tuple__ as _VLLM

from connectors import settings
from connectors.exchange import Bytes, Exchange
from connectors.modelid import model_name
from connectors.weights import weights_digest
from kvstore.config import default_socket
from kvstore.errors import ConfigError
from kvstore.identity import Namespace
from kvstore.node.client import Client
from kvstore.node.launch import launch

WORKERS = 4
"""Threads that copy rows; each copy releases the interpreter lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """What the tier's entry in ``secondary_tiers`` may hold beside vLLM's own ``type``, ``module_path`` and ``backpressure``."""

    socket: str = ""
    """Where the node listens; empty for the default."""
    autostart: bool = True
    """Start a node when none answers."""
    load_timeout_s: float = 10.0
    """A load that takes longer ends, and what it has not brought is computed."""
    weights: str = ""
    """Revision of the weights; may be empty when the model is a local folder."""
    locality: str = ""
    """Where vLLM's filters and KV events take the tier to be: LOCAL or REMOTE; empty for nowhere."""
    enable_kv_events: bool = False
    """Name in vLLM's own KV events (``--kv-events-config``) what is stored here, and what a load did not find any more."""


class KVStoreTier(SecondaryTierManager):  # type: ignore[misc]
    """A tier over the node of this machine: shared by its engines, durable, capped, checksummed, replicated."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **extra: Any,
    ) -> None:
        """``extra``: see ``TierOptions``. Raises ConfigError."""
        options = settings.parse(TierOptions, extra, "secondary_tiers")
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = _locality(options.locality)
        path = options.socket or str(default_socket())
        self._client = Client(path, name="vllm offloading")
        self._exchange = Exchange(
            self._client,
            namespace_of(offloading_spec, self.block_size_bytes, options.weights),
            self.block_size_bytes,
            options.load_timeout_s,
            partial(launch, path) if options.autostart else None,
        )
        self._rows = np.frombuffer(primary_kv_view.cast("B"), np.uint8).reshape(-1, self.block_size_bytes)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="kvstore-tier")
        self._jobs: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[tuple[TransferJob, list[bool], float]] = queue.SimpleQueue()
        self._lookups = _Lookups(tier_type, self._exchange)
        self._events: list[OffloadingEvent] = []
        self._tells = options.enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """The answer comes with a later step: what a step asks for goes to the node at its end, in one round trip a request."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._exchange.save)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._exchange.load)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        while not self._finished.empty():
            job, moved, seconds = self._finished.get()
            here = [key for key, well in zip(job.keys, moved, strict=True) if well]
            gone = [key for key, well in zip(job.keys, moved, strict=True) if not well] if job.is_promotion else []
            self._lookups.mark_miss(gone)
            self._tell([] if job.is_promotion else here, removed=False)
            self._tell(gone, removed=True)
            results.append(
                JobResult(
                    job_id=job.job_id,
                    success=all(moved),
                    successful_keys=here or None,
                    transfer_time=seconds,
                    transfer_bytes=sum(moved) * self.block_size_bytes,
                )
            )
        return results

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What the node gives up by itself is told of when a load misses it, not before."""
        events, self._events = self._events, []
        return events

    def has_pending_work(self) -> bool:
        return bool(self._jobs) or not self._finished.empty()

    def drain_jobs(self) -> None:
        wait(self._jobs)

    def shutdown(self) -> None:
        """Wait for the copies under way and let go of vLLM's memory."""
        self._lookups.shutdown()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()
        del self._rows

    def _tell(self, keys: list[OffloadKey], removed: bool) -> None:
        if keys and self._tells:
            self._events.append(OffloadingEvent(keys, self.medium, removed, self.locality))

    def _submit(self, job: TransferJob, move: Callable[[Sequence[bytes], Sequence[Bytes]], list[bool]]) -> None:
        keys, rows = list(job.keys), [self._rows[int(chunk)] for chunk in job.chunk_ids]

        def run() -> None:
            started = time.monotonic()
            moved = [False] * len(keys)
            try:
                moved = move(keys, rows)
            finally:
                self._finished.put((job, moved, time.monotonic() - started))

        future = self._pool.submit(run)
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """Asks the node in a thread of its own."""

    def __init__(self, tier_type: str, exchange: Exchange) -> None:
        self._exchange = exchange
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._exchange.contains(keys)


def _locality(text: str) -> Locality | None:
    try:
        return Locality(text) if text else None
    except ValueError:
        known = ", ".join(each.value for each in Locality)
        raise ConfigError("secondary_tiers.locality", text, "no such locality", f"Known: {known}.") from None


def namespace_of(spec: Any, row_bytes: int, weights: str) -> Namespace:
    """All that shapes a row: what vLLM's own file tier tells rows apart by, and what that leaves out. Raises ConfigError."""
    model = spec.config.model
    revision = weights or (weights_digest(model.name) if Path(model.name).is_dir() else None)
    if not revision:
        raise ConfigError(
            "secondary_tiers.weights",
            model.name,
            "the revision of the weights is unknown",
            "Name it in the tier's settings.",
        )
    fields = FileMapper.from_offloading_spec("", spec, spec.blocks_per_chunk, parallel_agnostic=True).get_run_config()
    fields |= {"model_name": "", "row_bytes": row_bytes, "kv_cache_layout": spec.config.kv_cache_layout}
    shape = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    return Namespace(
        model=model_name(model.name),
        weights=revision,
        dtype=str(model.dtype),
        layers=1,
        kv_heads=1,
        head_dim=1,
        attention="opaque",
        rope="",
        block_tokens=max(spec.tokens_per_block) * spec.blocks_per_chunk,
        layout=f"opaque:vllm-offloading-{_VLLM[0]}.{_VLLM[1]}:{shape}",
    )
