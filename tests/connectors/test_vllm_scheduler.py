"""The connector inside a real vLLM scheduler; no model runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import connectors.vllm.connector as module
import connectors.vllm.in_step as in_step
from connectors.link import Link
from connectors.paging.base import ABSENT
from connectors.vllm.connector import KVStoreConnector
from connectors.vllm.keys import Geometry
from connectors.vllm.options import Options
from connectors.vllm.plan import Told
from connectors.vllm.process import transfer_config
from kvstore.errors import ConfigError, DeadlineExceeded
from kvstore.node.api import NewBlock
from kvstore.testing.inprocess import InProcessNode
from kvstore.testing.model import make_model
from kvstore.testing.node import wait_for

PAGE, PAGES = 16, 120
BLOCK = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_none_hash(sha256)
    return make_model(tmp_path_factory.mktemp("model"), ["some text"])


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessNode]:
    node = InProcessNode(64 << 20)
    links = []

    def connect(options: Options, geometry: Geometry, start_node: bool) -> Link:
        links.append(link := Link(node, geometry.namespace, geometry.block_bytes))
        wait_for(lambda: link.keyring is not None)
        return link

    monkeypatch.setattr(module, "connect", connect)
    yield node
    for link in links:
        link.close()


def config(model: Path, chunk: int = 1024, **extra: Any) -> VllmConfig:
    cache = CacheConfig(block_size=PAGE, enable_prefix_caching=True)
    cache.kv_cache_layout = "LBNHC"
    return VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float32", seed=0),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=chunk, max_model_len=4096, enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        cache_config=cache,
        kv_transfer_config=KVTransferConfig(**transfer_config(extra)),
        device_config=DeviceConfig("cpu"),
    )  # fmt: skip


def kv_config(*specs: Any) -> KVCacheConfig:
    specs = specs or (FullAttentionSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32),)
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=PAGES, kv_cache_tensors=[], kv_cache_groups=groups)


def make_scheduler(model: Path, *specs: Any, kind: type[Scheduler] = Scheduler, **extra: Any) -> Scheduler:
    vllm_config = config(model, **extra)
    vllm_config.cache_config.num_gpu_blocks = PAGES
    return kind(
        vllm_config=vllm_config, kv_cache_config=kv_config(*specs), log_stats=True, block_size=PAGE,
        structured_output_manager=StructuredOutputManager(vllm_config), hash_block_size=None,
    )  # fmt: skip


def make_request(name: str, tokens: list[int], **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=3)
    sampling.update_from_generation_config({}, 50256)
    hasher = get_request_block_hasher(PAGE, sha256)
    return Request(name, tokens, sampling, None, mm_features=None, block_hasher=hasher, **fields)


def computed(request: Request) -> bool:
    return request.num_computed_tokens >= request.num_tokens


def answer(scheduler: Scheduler, step: Any, **connector: Any) -> None:
    """What the workers would report for a step: one token for each request that finished its prompt."""
    sampled = [[5] if computed(scheduler.requests[name]) else [] for name in step.num_scheduled_tokens]
    deliver(scheduler, step, sampled, **connector)


def deliver(scheduler: Scheduler, step: Any, sampled: list[list[int]], **connector: Any) -> None:
    ids = list(step.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=ids, req_id_to_index={name: i for i, name in enumerate(ids)}, sampled_token_ids=sampled,
        logprobs=None, prompt_logprobs_dict={}, pooler_output=None, kv_connector_output=KVConnectorOutput(**connector),
    )  # fmt: skip
    scheduler.update_from_output(step, output)


def finish(scheduler: Scheduler) -> None:
    while scheduler.requests:
        answer(scheduler, scheduler.schedule())
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.free_block_queue.num_free_blocks == pool.num_gpu_blocks - 1, "a page leaked"


def plan(scheduler: Scheduler, request: Request) -> Any:
    scheduler.add_request(request)
    return scheduler.schedule()


def store(node: InProcessNode, scheduler: Scheduler, blocks: list[NewBlock]) -> None:
    namespace = scheduler.connector._geometry.namespace
    node.reserve(namespace, blocks)
    assert len(node.commit([block.key for block in blocks])) == len(blocks)


TOKENS = [(7 * k) % 97 for k in range(5 * BLOCK + 3)]


@pytest.fixture
def stocked(model: Path, node: InProcessNode) -> Callable[..., Scheduler]:
    """Makes a scheduler whose node holds the five blocks of TOKENS."""

    def make(**extra: Any) -> Scheduler:
        scheduler = make_scheduler(model, **extra)
        step = plan(scheduler, make_request("first", TOKENS))
        saves = step.kv_connector_metadata.saves
        assert [save.block.index for save in saves] == [0, 1, 2, 3, 4]
        assert [save.block.parent for save in saves[1:]] == [save.block.key for save in saves[:-1]]
        table = scheduler.kv_cache_manager.get_block_ids("first")[0]
        assert [page for save in saves for page in save.pages] == table[: 5 * BLOCK // PAGE]
        store(node, scheduler, [save.block for save in saves])
        answer(scheduler, step)
        finish(scheduler)
        scheduler.reset_prefix_cache()
        return scheduler

    return make


def test_a_load_covers_all_whole_blocks(stocked: Callable[..., Scheduler]) -> None:
    scheduler = stocked()
    request = make_request("second", TOKENS)
    step = plan(scheduler, request)
    (load,) = step.kv_connector_metadata.loads
    assert len(load.keys) == 5
    assert len(load.pages) == 5 * BLOCK // PAGE
    assert request.status.name == "WAITING_FOR_REMOTE_KVS"
    assert step.total_num_scheduled_tokens == 0
    answer(scheduler, step, finished_recving={"second"})
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"second": 3}
    assert not step.kv_connector_metadata.saves, "what was loaded is not saved again"
    answer(scheduler, step)
    finish(scheduler)


@pytest.mark.parametrize("bad_page", [0, 9])
def test_a_failed_load_is_computed_and_saved_again(stocked: Callable[..., Scheduler], bad_page: int) -> None:
    scheduler = stocked()
    request = make_request("second", TOKENS)
    step = plan(scheduler, request)
    (load,) = step.kv_connector_metadata.loads
    answer(scheduler, step, invalid_block_ids=set(load.pages[bad_page:]), finished_recving={"second"})
    step = scheduler.schedule()
    assert not step.kv_connector_metadata.loads, "a load that failed is not tried again"
    assert step.num_scheduled_tokens == {"second": len(TOKENS) - bad_page * PAGE}
    first_bad = bad_page * PAGE // BLOCK
    assert [save.block.index for save in step.kv_connector_metadata.saves] == list(range(first_bad, 5))
    answer(scheduler, step)
    finish(scheduler)


def test_a_hit_inside_a_block_loads_the_rest(stocked: Callable[..., Scheduler]) -> None:
    scheduler = stocked()
    step = plan(scheduler, make_request("short", TOKENS[: BLOCK + PAGE + 1]))
    answer(scheduler, step, finished_recving={load.request_id for load in step.kv_connector_metadata.loads})
    finish(scheduler)  # leaves its five pages in vLLM's own prefix cache
    step = plan(scheduler, make_request("long", TOKENS))
    (load,) = step.kv_connector_metadata.loads
    assert load.first_page == 1
    assert len(load.keys) == 4
    assert len(load.pages) == 4 * BLOCK // PAGE - 1


def test_salt_and_prompt_logprobs_do_not_read(stocked: Callable[..., Scheduler]) -> None:
    scheduler = stocked()
    salted = make_request("salted", TOKENS, cache_salt="x")
    assert not plan(scheduler, salted).kv_connector_metadata.loads
    blind = make_request("blind", TOKENS)
    blind.skip_reading_prefix_cache = True
    assert not plan(scheduler, blind).kv_connector_metadata.loads


def test_decoded_tokens_are_saved_too(model: Path, node: InProcessNode) -> None:
    scheduler = make_scheduler(model)
    step = plan(scheduler, make_request("only", TOKENS[: BLOCK - 1]))
    assert not step.kv_connector_metadata.saves
    answer(scheduler, step)
    step = scheduler.schedule()
    assert [save.block.index for save in step.kv_connector_metadata.saves] == [0]


PREPARED = Told(ready=Counter({1: 1}))
LOADED = Told(in_step=True)


@pytest.fixture
def prepared(stocked: Callable[..., Scheduler]) -> Scheduler:
    """A stocked scheduler whose worker can copy from the arena."""
    scheduler = stocked()
    scheduler.connector.planner.heard(PREPARED)
    return scheduler


def leases(node: InProcessNode) -> int:
    return sum(slot.leases for slot in node._slots.values())


def test_a_lone_request_loads_within_the_step(prepared: Scheduler, node: InProcessNode) -> None:
    step = plan(prepared, make_request("second", TOKENS))
    (load,) = step.kv_connector_metadata.loads
    assert (len(load.keys), len(load.pages)) == (5, 5 * BLOCK // PAGE)
    assert load.slots.offsets == node.acquire(load.keys, 0.0).offsets
    node.release(load.keys)
    assert step.has_sync_kv_loads
    assert step.num_scheduled_tokens == {"second": 3}
    assert not step.kv_connector_metadata.saves, "what was loaded is not saved again"
    assert leases(node) == 5
    answer(prepared, step, kv_connector_worker_meta=LOADED)
    assert leases(node) == 0
    finish(prepared)


def test_blocks_are_held_while_the_next_step_is_scheduled_ahead(
    stocked: Callable[..., Scheduler], node: InProcessNode
) -> None:
    """As with asynchronous scheduling, where a request may even be over before the results of its step are there."""
    scheduler = stocked(kind=AsyncScheduler)
    scheduler.connector.planner.heard(PREPARED)
    first = plan(scheduler, make_request("second", TOKENS))
    assert first.has_sync_kv_loads
    late = make_request("late", TOKENS)
    following = plan(scheduler, late)
    assert following.num_scheduled_tokens["second"] == 1
    assert not any(load.slots for load in following.kv_connector_metadata.loads), "the first is being computed on"
    assert leases(node) == 5
    scheduler.finish_requests("second", RequestStatus.FINISHED_ABORTED)
    assert leases(node) == 5
    deliver(scheduler, first, [[5]], kv_connector_worker_meta=LOADED)
    assert leases(node) == 0
    deliver(scheduler, following, [[5]] * len(following.num_scheduled_tokens))


def test_a_step_computes_at_least_one_token(prepared: Scheduler) -> None:
    step = plan(prepared, make_request("second", TOKENS[: 5 * BLOCK]))
    (load,) = step.kv_connector_metadata.loads
    assert (len(load.keys), len(load.pages)) == (5, 5 * BLOCK // PAGE - 1)
    assert step.num_scheduled_tokens == {"second": PAGE}
    answer(prepared, step, kv_connector_worker_meta=LOADED)
    finish(prepared)


def test_nobody_who_is_computed_on_waits_for_a_load(prepared: Scheduler, node: InProcessNode) -> None:
    answer(prepared, plan(prepared, make_request("other", [1, 2, 3])))
    second = make_request("second", TOKENS)
    step = plan(prepared, second)
    (load,) = step.kv_connector_metadata.loads
    assert load.slots is None
    assert second.status.name == "WAITING_FOR_REMOTE_KVS"
    assert leases(node) == 0
    answer(prepared, step, finished_recving={"second"})
    finish(prepared)


def test_requests_admitted_together_load_in_one_step_while_that_is_short(
    prepared: Scheduler, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three(names: str) -> Any:
        for name in names:
            prepared.add_request(make_request(name, TOKENS))
        return prepared.schedule()

    planner = prepared.connector.planner
    seconds = [planner._timing.load_seconds(5 * count * planner._geometry.block_bytes) for count in (2, 3)]
    monkeypatch.setattr(in_step, "IN_STEP_SECONDS", sum(seconds) / 2)
    monkeypatch.setattr(prepared.kv_cache_manager, "enable_caching", False)
    step = three("abc")
    assert [bool(load.slots) for load in step.kv_connector_metadata.loads] == [True, True, False]
    assert step.num_scheduled_tokens == {"a": 3, "b": 3}
    assert leases(node) == 10
    answer(prepared, step, kv_connector_worker_meta=LOADED, finished_recving={"c"})
    finish(prepared)
    assert all(load.slots for load in three("de").kv_connector_metadata.loads), "each step anew"


def test_a_node_that_hangs_is_waited_for_once(
    prepared: Scheduler, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers, open_namespace = threading.Event(), node.open_namespace

    def hang(*args: Any, **kwargs: Any) -> Any:
        asked.append("lookup")
        raise DeadlineExceeded("no answer")

    def ask(name: str) -> tuple[int, bool]:
        request = make_request(name, TOKENS)
        prepared.connector.on_new_request(request)
        found: tuple[int, bool] = prepared.connector.get_num_new_matched_tokens(request, 0)
        return found

    monkeypatch.setattr(node, "lookup", hang)
    monkeypatch.setattr(node, "open_namespace", lambda *args: answers.wait(30) and open_namespace(*args))
    assert [ask("a"), ask("b")] == [(0, False)] * 2
    assert len(asked) == 1
    answers.set()
    wait_for(lambda: ask("c") and len(asked) > 1)


def test_asking_twice_holds_once_and_what_is_not_admitted_is_let_go(prepared: Scheduler, node: InProcessNode) -> None:
    connector = prepared.connector
    request = make_request("second", TOKENS)
    connector.on_new_request(request)
    for _ in range(3):
        assert connector.get_num_new_matched_tokens(request, 0) == (5 * BLOCK, False)
        assert leases(node) == 5
    assert not prepared.schedule().kv_connector_metadata.loads
    assert leases(node) == 0


def test_a_preempted_request_may_load_within_a_step_again(prepared: Scheduler, node: InProcessNode) -> None:
    connector = prepared.connector
    request = make_request("second", TOKENS)
    answer(prepared, plan(prepared, request), kv_connector_worker_meta=LOADED)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    request.num_preemptions += 1
    assert connector.get_num_new_matched_tokens(request, 0) == (5 * BLOCK, False)
    assert leases(node) == 5


def test_blocks_that_left_memory_since_the_lookup_are_loaded_asynchronously(
    prepared: Scheduler, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = node.acquire
    monkeypatch.setattr(node, "acquire", lambda keys, timeout: acquire(keys[:3], timeout))
    step = plan(prepared, make_request("second", TOKENS))
    (load,) = step.kv_connector_metadata.loads
    assert (len(load.keys), load.slots) == (5, None)
    assert leases(node) == 0


def test_of_a_request_whose_load_failed_in_the_step_nothing_is_saved(prepared: Scheduler) -> None:
    step = plan(prepared, make_request("second", TOKENS))
    (load,) = step.kv_connector_metadata.loads
    told = Told(in_step=True, failed=frozenset({"second"}))
    answer(prepared, step, kv_connector_worker_meta=told, invalid_block_ids=set(load.pages))
    step = prepared.schedule()
    assert step.num_scheduled_tokens == {"second": len(TOKENS)}
    assert not step.kv_connector_metadata.saves
    answer(prepared, step)
    finish(prepared)


def test_window_layers_are_never_loaded_within_a_step(hybrid: Scheduler, node: InProcessNode) -> None:
    hybrid.connector.planner.heard(PREPARED)
    (load,) = plan(hybrid, make_request("second", TOKENS)).kv_connector_metadata.loads
    assert load.slots is None
    assert leases(node) == 0


WINDOW = 64
HYBRID = (
    SlidingWindowSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32, sliding_window=WINDOW),
    FullAttentionSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32),
)


@pytest.fixture(params=[1024, 80], ids=["at once", "in chunks"])
def hybrid(model: Path, node: InProcessNode, request: pytest.FixtureRequest) -> Scheduler:
    """A scheduler with a window group and a full one, whose node holds the five blocks of TOKENS."""
    scheduler = make_scheduler(model, *HYBRID, chunk=request.param)
    scheduler.add_request(make_request("first", TOKENS))
    saves = []
    while len(saves) < 5:
        step = scheduler.schedule()
        saves += (new := step.kv_connector_metadata.saves)
        window, full = scheduler.kv_cache_manager.get_block_ids("first")
        for save in new:
            pages = slice(save.block.index * BLOCK // PAGE, (save.block.index + 1) * BLOCK // PAGE)
            assert save.pages == (*window[pages], *full[pages])
            assert 0 not in save.pages, "all pages of a block are there when it is completed"
        store(node, scheduler, [save.block for save in new])
        answer(scheduler, step)
    assert [save.block.index for save in saves] == [0, 1, 2, 3, 4]
    finish(scheduler)
    scheduler.reset_prefix_cache()
    return scheduler


def test_a_hybrid_load_fills_the_last_window_of_window_layers(hybrid: Scheduler) -> None:
    step = plan(hybrid, make_request("second", TOKENS))
    (load,) = step.kv_connector_metadata.loads
    assert len(load.keys) == 5
    window, full = hybrid.kv_cache_manager.get_block_ids("second")
    assert window[: -WINDOW // PAGE] == [0] * (5 * BLOCK // PAGE - WINDOW // PAGE), "vLLM keeps the last window only"
    assert load.pages == (*(page or ABSENT for page in window), *full)
    rows = list(load.parts(BLOCK // PAGE, 2))
    assert [set(pages[:4]) == {ABSENT} for _, pages, _ in rows] == [True] * 4 + [False]
    assert all(ABSENT not in pages[4:] for _, pages, _ in rows)
    assert step.kv_connector_metadata.overwritten == {page for page in load.pages if page != ABSENT}
    answer(hybrid, step, finished_recving={"second"})
    step = hybrid.schedule()
    assert step.num_scheduled_tokens == {"second": 3}
    assert not step.kv_connector_metadata.saves
    answer(hybrid, step)
    finish(hybrid)


def test_a_hybrid_load_that_fails_is_computed_from_the_start(hybrid: Scheduler) -> None:
    step = plan(hybrid, make_request("second", TOKENS))
    assert step.kv_connector_metadata.loads
    answer(hybrid, step, finished_recving={"second"}, failed_recving={"second"})
    saved, done = [], 0
    while done < len(TOKENS):
        step = hybrid.schedule()
        assert not step.kv_connector_metadata.loads, "a load that failed is not tried again"
        done += step.num_scheduled_tokens["second"]
        saved += [save.block.index for save in step.kv_connector_metadata.saves]
        answer(hybrid, step)
    assert saved == list(range(5))
    finish(hybrid)


def test_a_hybrid_prompt_is_never_loaded_whole(hybrid: Scheduler) -> None:
    """vLLM computes the last token of such a prompt again, and a window that ends behind it may have passed its first."""
    request = make_request("second", TOKENS[: 4 * BLOCK])
    (load,) = plan(hybrid, request).kv_connector_metadata.loads
    assert len(load.keys) == 3


def test_a_hybrid_block_that_lost_pages_is_not_saved(hybrid: Scheduler, node: InProcessNode) -> None:
    """A prefix that vLLM still has, and the node no more: of the window layers only its last pages are there."""
    step = plan(hybrid, make_request("second", TOKENS))
    answer(hybrid, step, finished_recving={"second"})
    finish(hybrid)
    hybrid.connector.planner._stored.clear()
    step = plan(hybrid, make_request("third", [*TOKENS[: 5 * BLOCK], *range(BLOCK + 1)]))
    saves = list(step.kv_connector_metadata.saves)
    while not any(save.block.index == 5 for save in saves):
        answer(hybrid, step)
        step = hybrid.schedule()
        saves += step.kv_connector_metadata.saves
    assert {save.block.index for save in saves} <= {4, 5}
    assert all(ABSENT not in save.pages and 0 not in save.pages for save in saves)


def test_what_cannot_be_served_is_refused_by_name(model: Path) -> None:
    vllm_config = config(model)
    window = SlidingWindowSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32, sliding_window=64)
    full = FullAttentionSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32)
    small = SlidingWindowSpec(block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32, sliding_window=32)
    with pytest.raises(ConfigError, match="attend to 32 tokens"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(full, window, small))
    large = FullAttentionSpec(block_size=2 * PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32)
    with pytest.raises(ConfigError, match="page sizes"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(window, large))
    state = MambaSpec(block_size=PAGE, shapes=((4,),), dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match="align"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(full, state))
    aligned = replace(state, mamba_cache_mode="align")
    with pytest.raises(ConfigError, match="without attention layers"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(aligned))
    other = replace(aligned, shapes=((8,),))
    with pytest.raises(ConfigError, match="different kinds"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(full, aligned, other))
    with pytest.raises(ConfigError, match="states at pages of 16 tokens"):
        KVStoreConnector(config(model, block_tokens=64), module.KVConnectorRole.SCHEDULER, kv_config(full, aligned))
    chunked = ChunkedLocalAttentionSpec(
        block_size=PAGE, num_kv_heads=4, head_size=64, dtype=torch.float32, attention_chunk_size=64
    )
    with pytest.raises(ConfigError, match="only full and sliding-window"):
        KVStoreConnector(vllm_config, module.KVConnectorRole.SCHEDULER, kv_config(full, chunked))
    with pytest.raises(ConfigError, match="no such setting"):
        KVStoreConnector(config(model, sokcet="x"), module.KVConnectorRole.SCHEDULER, kv_config())
    with pytest.raises(ConfigError, match="multiple of 16"):
        KVStoreConnector(config(model, block_tokens=24), module.KVConnectorRole.SCHEDULER, kv_config())


def test_namespaces_differ_where_bytes_would(model: Path, tmp_path: Path, node: InProcessNode) -> None:
    def namespace(folder: Path, **extra: Any) -> Any:
        return make_scheduler(folder, **extra).connector._geometry.namespace

    base = namespace(model)
    assert namespace(model) == base
    assert set(namespace(model, block_tokens=128).difference(base)) == {"block_tokens"}
    other = make_model(tmp_path / model.name, ["some text"], seed=2)
    assert set(namespace(other).difference(base)) == {"weights"}
