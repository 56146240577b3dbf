"""The class vLLM loads: one instance in the scheduler, one in each worker. Everything it does is delegated."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from connectors.link import Link
from connectors.vllm.describe import Describer
from connectors.vllm.keys import Geometry, geometry
from connectors.vllm.metrics import PromMetrics, Recorder, Stats
from connectors.vllm.options import Options
from connectors.vllm.pagers import make_pagers
from connectors.vllm.plan import StepPlan, Told
from connectors.vllm.scheduler import Planner
from connectors.vllm.timing import Timing
from connectors.vllm.worker import Ended, Mover
from kvstore import tracing
from kvstore.config import default_socket
from kvstore.errors import ConfigError
from kvstore.node.client import Client
from kvstore.node.launch import launch
from kvstore.tiers.base import Medium

try:  # vLLM 0.32 and later hear of requests whose load failed
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:
    KVConnectorTransferResults = None

try:  # vLLM 0.32 and later label hits by where they came from
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    _SOURCES: dict[Medium, Any] = {}
else:
    _SOURCES = {Medium.HOST: CacheHitSource.HOST, Medium.DISK: CacheHitSource.DISK}

IDLE_WAIT = 0.002
"""Seconds. With nothing to compute vLLM asks for loads that ended in a loop, which would keep the interpreter from them."""

logger = logging.getLogger("vllm.kvstore")

CONNECT_TIMEOUT = 0.5
"""Seconds. An engine thread pays for it at most once, when it finds the connection lost before the link does."""


def connect(options: Options, geometry: Geometry, start_node: bool) -> Link:
    """A link to the node of this machine."""
    socket = options.socket or default_socket()
    start = partial(launch, socket) if start_node and options.autostart else None
    client = Client(socket, "vLLM", max(CONNECT_TIMEOUT, options.lookup_timeout_s))
    states = (geometry.states.namespace, geometry.states.block_bytes) if geometry.states else None
    return Link(client, geometry.namespace, geometry.block_bytes, start, states)


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Loads and saves prefix KV through the node of this machine. For vLLM 0.26 to 0.33.

    A request waits for its own load only, and nothing is computed, let alone saved, from KV that may yet turn out bad: loads are
    asynchronous, but for blocks in the node's memory, which were verified when they entered it and are held there. When nobody
    else is being computed on, those are loaded within the step (``in_step.py``).

    Options go into ``kv_connector_extra_config``; see ``Options``. Set ``kv_load_failure_policy`` to ``recompute``: vLLM's
    default fails a request whose load fails.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = Options.parse(transfer.kv_connector_extra_config)
        self._geometry = geometry(vllm_config, kv_cache_config, self._options)
        if self._geometry.tables.windowed and KVConnectorTransferResults is None:
            raise ConfigError(
                "kv_cache_groups", self._geometry.namespace.attention, "window layers need vLLM 0.32",
                "Start vLLM with --disable-hybrid-kv-cache-manager.",
            )  # fmt: skip
        self._recorder = Recorder()
        tracing.start("kvstore-vllm", self._options.otlp_endpoint, self._options.trace_sample_ratio)
        scheduler = role == KVConnectorRole.SCHEDULER
        self._link = connect(self._options, self._geometry, start_node=scheduler)
        self._planner: Planner | None = None
        self._mover: Mover | None = None
        self._describer: Describer | None = None
        if scheduler:
            self._describer = Describer.make(self._link, self._options)
            ranks = vllm_config.parallel_config.tensor_parallel_size
            self._timing = Timing(self._link, ranks)
            timeout = self._options.lookup_timeout_s
            self._planner = Planner(self._link, self._geometry, self._recorder, self._timing, timeout)
            if transfer.kv_load_failure_policy != "recompute":
                logger.warning('kv_load_failure_policy is "%s"; set it to "recompute"', transfer.kv_load_failure_policy)
            logger.info("KV store: blocks of %d tokens, %s", self._geometry.block_tokens, self._geometry.namespace)

    # Scheduler side

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what we save."""
        return False

    @property
    def planner(self) -> Planner:
        assert self._planner is not None, "called in a worker"
        return self._planner

    def on_new_request(self, request: Any) -> None:
        self.planner.add(request)
        if self._describer is not None:
            self._describer.tell(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self.planner.offer(request, num_computed_tokens)
        return tokens, tokens > 0 and not self.planner.in_step(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.planner.admit(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        media = self.planner.media(request.request_id)
        if sum(media.values()) != num_external_tokens:
            return {self._cache_hit_source: num_external_tokens} if num_external_tokens else {}
        sources: dict[Any, int] = {}
        for medium, tokens in media.items():
            source = _SOURCES.get(medium, self._cache_hit_source)
            sources[source] = sources.get(source, 0) + tokens
        return sources

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        state = getattr(scheduler_output, "kv_connector_block_state", None)  # vLLM 0.32 and later
        if state is None:
            return self.planner.step(scheduler_output, None)
        return self.planner.step(scheduler_output, state.get_block_ids, state.boundary_state_offloads)

    def update_connector_output(self, connector_output: Any) -> None:
        self._timing.ended(connector_output)
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, Told):
            self.planner.heard(told)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.planner.finish(request)
        return False, None

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    # Worker side

    @property
    def mover(self) -> Mover:
        assert self._mover is not None, "called in the scheduler, or before register_kv_caches"
        return self._mover

    @property
    def _plan(self) -> StepPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        return plan

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        rank = get_tensor_model_parallel_rank()
        pager, states = make_pagers(kv_caches, self._kv_cache_config.num_blocks, self._geometry, rank)
        timeout = self._options.load_timeout_s
        self._mover = Mover(self._link, pager, self._geometry, rank, self._recorder, timeout, states)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepPlan)
        self.mover.protect(kv_connector_metadata.overwritten)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.mover.begin_saves(self._plan.saves, self._plan.states)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.mover.load_in_step([load for load in self._plan.loads if load.slots])
        for load in self._plan.loads:
            if not load.slots:
                self.mover.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request is scheduled when its load has ended, or the step waits for it as a whole."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are made of whole blocks, after the forward pass."""

    def wait_for_save(self) -> None:
        self.mover.finish_saves()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._ended().received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """vLLM 0.32 and later ask this instead of ``get_finished``."""
        ended = self._ended()
        return KVConnectorTransferResults(finished_recving=ended.received, failed_recving=ended.failed)

    def _ended(self) -> Ended:
        return self.mover.take_ended(IDLE_WAIT if self._plan.idle else 0.0)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.mover.take_bad_pages()

    def build_connector_worker_meta(self) -> Told | None:
        return self.mover.take_told()

    # Both

    def get_kv_connector_stats(self) -> Stats | None:
        return self._recorder.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._describer is not None:
            self._describer.close()
        if self._mover is not None:
            self._mover.close()
        else:
            self._link.close()
        tracing.stop()
