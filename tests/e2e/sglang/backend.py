"""The backend behind SGLang's factory, over its real host pools and a real node."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    DIM,
    HEADS,
    LAYERS,
    LAYOUTS,
    PAGE,
    PAGES,
    Backends,
    content,
    fill,
    hashes,
    mha_pool,
    mla_pool,
    serve,
    slots,
    storage_config,
    wait,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolHitPolicy, PoolName, PoolTransfer, PoolTransferResult
from sglang.srt.mem_cache.utils import get_hash_str

import connectors.sglang.geometry as geometry
from connectors.sglang import KVStoreStorage
from connectors.sglang.geometry import bind
from connectors.sglang.hooks import OBSERVER
from connectors.sglang.options import Options
from connectors.sglang.pages import CanonicalPages, OpaquePages, page_view
from connectors.sglang.pools import usable_prefix
from kvstore.errors import ConfigError
from kvstore.identity import chain_digests
from kvstore.layout import BlockLayout
from kvstore.node.client import Client, _Connection
from kvstore.testing.node import NodeProcess, RunningNode

MLA_LAYOUTS = LAYOUTS[:3]


# Bytes


@pytest.mark.parametrize("saved_as", LAYOUTS)
def test_pages_come_back_in_every_layout(backends: Backends, saved_as: str) -> None:
    source = fill(mha_pool(saved_as), 1)
    keys = hashes(4)
    assert backends(source).batch_set_v1(keys, slots(3, 0, 7, 5)) == [True] * 4
    for layout in LAYOUTS:
        sink = fill(mha_pool(layout), 2)
        untouched = content(sink, 0, 3)
        backend = backends(sink)
        assert backend.batch_exists([*keys, "00" * 32]) == 4
        assert backend.batch_get_v1(keys, slots(4, 6, 1, 2)) == [True] * 4
        assert torch.equal(content(sink, 4, 6, 1, 2), content(source, 3, 0, 7, 5))
        assert torch.equal(content(sink, 0, 3), untouched)


@pytest.mark.parametrize("saved_as", MLA_LAYOUTS)
def test_latents_come_back_in_every_layout(backends: Backends, saved_as: str) -> None:
    source = fill(mla_pool(saved_as), 1)
    keys = hashes(3)
    assert all(backends(source).batch_set_v1(keys, slots(2, 0, 5)))
    for layout in MLA_LAYOUTS:
        sink = fill(mla_pool(layout), 2)
        assert all(backends(sink).batch_get_v1(keys, slots(1, 4, 3)))
        assert torch.equal(content(sink, 1, 4, 3), content(source, 2, 0, 5))


@pytest.mark.parametrize("opaque", [False, True])
def test_other_threads_run_while_a_page_is_copied(opaque: bool) -> None:
    """Threads are not switched for an hour, so another one runs only where the interpreter lock is given away."""
    heads = 2048
    pool = mha_pool("page_first_direct" if opaque else "layer_first", heads=heads)
    block = BlockLayout(tokens=PAGE, layers=LAYERS, kv_heads=heads, head_dim=DIM, itemsize=2)
    pages = OpaquePages(pool) if opaque else CanonicalPages(pool, block, (0, heads))
    payload = memoryview(bytearray(block.nbytes))
    (place,) = pages.places(slots(0), 1)
    runs, done = [0], threading.Event()

    def other() -> None:
        while not done.is_set():
            runs[0] += 1
            time.sleep(0)

    def runs_during(copy: Callable[..., None]) -> bool:
        for _ in range(100):  # the system may not have woken it in time
            before = runs[0]
            copy(place, payload)
            if runs[0] > before:
                return True
        return False

    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    thread = threading.Thread(target=other)
    try:
        thread.start()
        assert not runs_during(lambda *_: sum(range(10_000)))
        assert runs_during(pages.save)
        assert runs_during(pages.load)
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_page_hashes_are_our_chain() -> None:
    """An engine that has the tokens finds the blocks that SGLang saved under hashes."""
    tokens = [(i * 7919) % 131072 for i in range(10 * PAGE)]
    ours = [digest.hex() for digest in chain_digests(tokens, PAGE)]
    try:
        theirs = get_hash_str(tokens, None, page_size=PAGE)
    except TypeError:  # one page a call in 0.5.11
        theirs = []
        for page in range(10):
            theirs.append(get_hash_str(tokens[page * PAGE : (page + 1) * PAGE], theirs[-1] if theirs else None))
    assert theirs == ours


# Without a copy


def shared(make: Callable[..., Any], layout: str, **options: Any) -> Any:
    """A pool in shared memory, with random content."""
    pool = fill(make(layout, allocator_type="shm", **options), 1)
    if getattr(pool, "fd", None) is None:
        pytest.skip("this SGLang has no such pools, and makes plain ones")
    return pool


def leave_on_disk(node: RunningNode, backend: KVStoreStorage, pages: list[str]) -> None:
    """Blocks are on the node's disk and nowhere else."""
    keys = [key for page in pages for key in backend._pools["kv"]._keyring().block_keys([bytes.fromhex(page)])]
    with Client(node.socket) as client:
        assert client.call("drain", 60, timeout=50)["drained"]
        wait(
            lambda: client.call("evict", medium="host", keys=b"".join(keys)) and held(node, backend, pages) == ["disk"]
        )


def held(node: RunningNode, backend: KVStoreStorage, pages: list[str]) -> list[str]:
    """The tiers that hold these pages."""
    with Client(node.socket) as client:
        keys = backend._pools["kv"]._keyring().block_keys(map(bytes.fromhex, pages))
        return sorted({medium for key in keys for medium in client.call("inspect", key=key)["media"]})


STRAIGHT = [(mha_pool, "page_head"), (mla_pool, "page_first")]
COPIED = [
    (mha_pool, "layer_first"),
    (mha_pool, "page_first"),
    (mha_pool, "page_first_direct"),
    (mla_pool, "layer_first"),
]


@pytest.mark.parametrize(("make", "layout"), STRAIGHT)
def test_pages_that_are_blocks_are_read_from_disk_without_a_copy(
    backends: Backends, node: RunningNode, make: Callable[..., Any], layout: str
) -> None:
    """The node's memory sees them when they are wanted again."""
    pool, keys = shared(make, layout), hashes(4)
    backend = backends(pool, allocator="shm")
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2, 3)))
    leave_on_disk(node, backend, keys)
    untouched = content(pool, 8, 9)
    assert all(backend.batch_get_v1(keys, slots(7, 4, 6, 5)))
    assert torch.equal(content(pool, 7, 4, 6, 5), content(pool, 0, 1, 2, 3))
    assert torch.equal(content(pool, 8, 9), untouched)
    assert held(node, backend, keys) == ["disk"]
    assert all(backend.batch_get_v1(keys, slots(8, 9, 10, 11)))
    assert torch.equal(content(pool, 8, 9, 10, 11), content(pool, 0, 1, 2, 3))
    assert held(node, backend, keys) == ["disk", "host"]
    assert backend.recorder.counts["bytes_loaded:kv"] == 8 * content(pool, 0).numel()


def test_pages_in_sglangs_own_order_are_read_from_disk_without_a_copy(
    backends: Backends, node: RunningNode, tmp_path: Path
) -> None:
    serve(tmp_path / "hybrid", num_hidden_layers=7)
    pool, keys = shared(mha_pool, "page_first"), hashes(3)
    backend = backends(pool, allocator="shm")
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2)))
    leave_on_disk(node, backend, keys)
    assert all(backend.batch_get_v1(keys, slots(3, 4, 5)))
    assert torch.equal(content(pool, 3, 4, 5), content(pool, 0, 1, 2))
    assert held(node, backend, keys) == ["disk"]


@pytest.mark.parametrize(("make", "layout"), COPIED)
def test_pages_that_are_converted_go_by_way_of_the_node(
    backends: Backends, node: RunningNode, make: Callable[..., Any], layout: str
) -> None:
    pool, keys = shared(make, layout), hashes(3)
    backend = backends(pool, allocator="shm")
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2)))
    leave_on_disk(node, backend, keys)
    assert all(backend.batch_get_v1(keys, slots(3, 4, 5)))
    assert torch.equal(content(pool, 3, 4, 5), content(pool, 0, 1, 2))
    assert held(node, backend, keys) == ["disk", "host"]


def test_ranks_that_want_the_same_blocks_share_one_reading(backends: Backends, node: RunningNode) -> None:
    pool, keys = shared(mla_pool, "page_first"), hashes(2)
    ranks = [backends(pool, rank=(rank, 2), allocator="shm") for rank in (0, 1)]
    assert all(ranks[0].batch_set_v1(keys, slots(0, 1)))
    leave_on_disk(node, ranks[0], keys)
    assert all(ranks[1].batch_get_v1(keys, slots(2, 3)))
    assert held(node, ranks[1], keys) == ["disk", "host"]
    assert torch.equal(content(pool, 2, 3), content(pool, 0, 1))


def test_blocks_in_memory_and_on_disk_come_in_one_load(backends: Backends, node: RunningNode) -> None:
    pool, keys = shared(mha_pool, "page_head"), hashes(6)
    backend = backends(pool, allocator="shm")
    assert all(backend.batch_set_v1(keys[:5], slots(0, 1, 2, 3, 4)))
    leave_on_disk(node, backend, keys[:1])
    leave_on_disk(node, backend, keys[3:5])
    loaded = backend.batch_get_v1(keys, slots(6, 7, 8, 9, 10, 11))
    assert loaded == [True] * 5 + [False]
    assert torch.equal(content(pool, 6, 7, 8, 9, 10), content(pool, 0, 1, 2, 3, 4))
    assert backend.recorder.counts["pages_missed:not_stored"] == 1


def test_a_page_that_does_not_verify_is_not_reported_as_loaded(
    backends: Backends, node: RunningNode, tmp_path: Path
) -> None:
    pool, keys = fill(shared(mha_pool, "page_head"), 2), hashes(4)
    backend = backends(pool, allocator="shm")
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2, 3)))
    leave_on_disk(node, backend, keys)
    block = content(pool, 2).numpy().tobytes()
    for path in node.config.disk_directory.glob("segment-*"):
        if (at := path.read_bytes().find(block)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 4100)
                file.write(bytes([block[4100] ^ 1]))
    assert backend.batch_get_v1(keys, slots(4, 5, 6, 7)) == [True, True, False, False]
    assert torch.equal(content(pool, 4, 5), content(pool, 0, 1))
    assert backend.recorder.counts["pages_missed:corrupt"] == 2
    assert backend.batch_exists(keys) == 2, "the node knows of it"


# What is stored


def test_a_prefix_ends_at_the_first_page_that_is_not_stored(backends: Backends) -> None:
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool)
    keys = hashes(6)
    backend.batch_set_v1(keys[:2], slots(0, 1))
    backend.batch_set_v1(keys[3:], slots(3, 4, 5), SimpleNamespace(prefix_keys=keys[:3]))
    assert backend.batch_exists(keys) == 2
    assert backend.batch_exists(keys[3:], SimpleNamespace(prefix_keys=keys[:3])) == 3
    assert backend.batch_exists([keys[2]]) == 0
    assert not backend.exists(keys[2])
    assert backend.exists(keys[5])

    before = content(pool, 8, 9, 10, 11)
    assert backend.batch_get_v1(keys, slots(6, 7, 8, 9, 10, 11)) == [True, True, False, False, False, False]
    assert torch.equal(content(pool, 8, 9, 10, 11), before)
    assert backend.recorder.counts["pages_missed:not_stored"] == 4


def test_a_lookup_is_one_round_trip_however_long_the_prompt(
    backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool)
    keys = hashes(2000)
    backend.batch_set_v1(keys[:3], slots(0, 1, 2))
    send, sent, here = _Connection._send, [], threading.get_ident()

    def noted(connection: _Connection, frame: bytes, deadline: float) -> None:
        if threading.get_ident() == here:
            sent.append(frame)
        send(connection, frame, deadline)

    monkeypatch.setattr(_Connection, "_send", noted)
    assert backend.batch_exists(keys) == 3
    assert len(sent) == 1
    assert backends(mha_pool("page_first", heads=HEADS // 2), rank=(1, 2)).batch_exists(keys) == 3
    assert len(sent) == 2


def test_blocks_know_the_one_before_them(backends: Backends, node: RunningNode) -> None:
    backend = backends(fill(mha_pool("page_first"), 1))
    keys = hashes(4)
    backend.batch_set_v1(keys[:2], slots(0, 1), SimpleNamespace(prefix_keys=[]))
    backend.batch_set_v1(keys[2:], slots(2, 3), SimpleNamespace(prefix_keys=keys[:2]))
    stored = backend._pools["kv"]._keyring().block_keys(map(bytes.fromhex, keys))
    with Client(node.socket) as client:
        found = [client.call("inspect", key=key) for key in stored]
    assert [entry["index"] for entry in found] == [0, 1, 2, 3]
    assert [entry["parent"] for entry in found] == [bytes(16), *stored[:3]]


def test_what_is_stored_is_not_written_again(backends: Backends) -> None:
    pool = fill(mha_pool("page_head"), 1)
    backend = backends(pool)
    keys = hashes(4)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: backend.batch_set_v1(keys, slots(0, 1, 2, 3)), range(8)))
    assert answers == [[True] * 4] * 8
    page_bytes = content(pool, 0).numel()
    assert backend.recorder.counts == {"bytes_saved:kv": 4 * page_bytes}
    stats = backend.get_stats()
    assert sum(stats.backup_pgs) == 4
    assert backend.get_stats().backup_pgs == []


def test_threads_save_look_up_and_load_at_the_same_time(backends: Backends) -> None:
    """As SGLang's do, which prefetches one prompt while it backs another up."""
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool)

    def thread(page: int) -> list[Any]:
        found = []
        for turn in range(8):
            keys = hashes(1, prompt=10 * turn + page)
            found += [backend.batch_set_v1(keys, slots(page)), backend.batch_exists(keys)]
            found += [backend.batch_get_v1(keys, slots(page + 6))]
            found += [torch.equal(content(pool, page + 6), content(pool, page))]
            page_view(pool)[:, page].random_(256)
        return found

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(thread, range(6))) == [[[True], 1, [True], True] * 8] * 6


def test_long_prompts_are_moved_in_chunks(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.sglang.transfers.CHUNK_BYTES", 3 * 16 * PAGE * HEADS * 2 * 2 * 2)
    pool = fill(mha_pool("page_first_direct"), 1)
    backend = backends(pool)
    keys = hashes(11)
    assert all(backend.batch_set_v1(keys[:5], slots(0, 1, 2, 3, 4)))
    assert backend.batch_get_v1(keys, slots(*range(11))) == [True] * 5 + [False] * 6
    assert all(backend.batch_get_v1(keys[:5], slots(5, 6, 7, 8, 9)))
    assert torch.equal(content(pool, 5, 6, 7, 8, 9), content(pool, 0, 1, 2, 3, 4))


# What the node is told


def test_a_request_that_sglang_names_can_be_explained(backends: Backends, node: RunningNode) -> None:
    backend = backends(fill(mha_pool("page_first"), 1))
    keys = hashes(4)
    backend.batch_set_v1(keys[:2], slots(0, 1))
    with OBSERVER.asking("request 7"):
        assert backend.batch_exists(keys) == 2
    with Client(node.socket) as client:
        found = client.call("explain", request="request 7")
    assert (found["client"], found["chain_blocks"], found["usable_blocks"]) == ("SGLang", 4, 2)
    assert [block["why"] for block in found["blocks"]] == ["held", "held", "never_stored", "never_stored"]


def test_what_is_computed_faster_than_it_is_loaded_is_left_alone(backends: Backends, node: RunningNode) -> None:
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool)
    keys = hashes(4)
    backend.batch_set_v1(keys, slots(0, 1, 2, 3))
    assert all(backend.batch_get_v1(keys, slots(4, 5, 6, 7)))
    scheduler, batch = (
        SimpleNamespace(waiting_queue=[]),
        SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: True)),
    )
    OBSERVER.begun(scheduler, SimpleNamespace(**vars(batch), prefix_lens=[0], extend_lens=[64]))
    OBSERVER.ended()
    assert backend.batch_exists(keys) == 4, "nothing is known of one step"
    for _ in range(8):
        backend._pools["kv"]._link.report_step(100_000, 1e6, 1e-6)
    with Client(node.socket) as client:

        def planner() -> Any:
            digest = backend._pools["kv"]._binding.namespace.to_dict()
            found = client.call("planner")["engines"]
            spaces = {each["digest"]: each["fields"] for each in client.call("status")["namespaces"]}
            ours = [each for each in found if spaces[each["namespace"]]["weights"] == digest["weights"]]
            return ours[0] if ours else {"prefill": {"steps": 0}}

        wait(lambda: planner()["prefill"]["steps"] == 9)
    assert backend.batch_exists(keys) == 0
    assert backends(mha_pool("page_first", heads=HEADS // 2), rank=(1, 2)).batch_exists(keys) == 4


def test_a_request_counts_once_however_many_ranks_ask(backends: Backends, node: RunningNode) -> None:
    pools = [mha_pool("page_first", heads=HEADS // 2) for _ in range(2)]
    ranks = [backends(pool, rank=(rank, 2)) for rank, pool in enumerate(pools)]

    def requests() -> float:
        with Client(node.socket) as client:
            return float(client.call("status")["counters"]["kvstore_requests_total"])

    before = requests()
    assert [rank.batch_exists(hashes(3)) for rank in ranks] == [0, 0]
    assert requests() == before + 1


# Ranks


def test_a_block_is_there_when_every_rank_has_written_its_heads(backends: Backends) -> None:
    whole, keys = fill(mha_pool("page_head"), 1), hashes(2)
    parts = [mha_pool("page_first", heads=HEADS // 2) for _ in range(2)]
    ranks = [backends(pool, rank=(rank, 2)) for rank, pool in enumerate(parts)]
    for rank, pool in enumerate(parts):
        both = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        page_view(pool)[:, :2] = page_view(whole)[:, :2, both]
    reader = backends(sink := fill(mha_pool("layer_first"), 2))

    assert all(ranks[1].batch_set_v1(keys, slots(0, 1)))
    assert reader.batch_exists(keys) == 0
    assert all(ranks[0].batch_set_v1(keys, slots(0, 1)))
    assert reader.batch_exists(keys) == 2
    assert all(reader.batch_get_v1(keys, slots(4, 5)))
    assert torch.equal(content(sink, 4, 5), content(whole, 0, 1))


def test_ranks_that_hold_the_same_leave_writing_to_one(backends: Backends) -> None:
    """MLA, and more ranks than KV heads."""
    latent = fill(mla_pool("page_first"), 1)
    first, second = backends(latent, rank=(0, 2)), backends(sink := fill(mla_pool("page_first"), 2), rank=(1, 2))
    assert all(second.batch_set_v1(hashes(1), slots(0)))
    assert second.batch_exists(hashes(1)) == 0
    assert all(first.batch_set_v1(hashes(1), slots(0)))
    assert all(second.batch_get_v1(hashes(1), slots(3)))
    assert torch.equal(content(sink, 3), content(latent, 0))

    pools = [fill(mha_pool("page_first", heads=1), rank // 2) for rank in range(2 * HEADS)]
    ranks = [backends(pool, rank=(rank, 2 * HEADS)) for rank, pool in enumerate(pools)]
    for rank in (1, 3, 5, 7, 6, 4, 2):
        assert all(ranks[rank].batch_set_v1(hashes(1, 1), slots(0)))
        assert ranks[0].batch_exists(hashes(1, 1)) == 0
    assert all(ranks[0].batch_set_v1(hashes(1, 1), slots(0)))
    for pool, backend in zip(pools, ranks, strict=True):
        assert all(backend.batch_get_v1(hashes(1, 1), slots(5)))
        assert torch.equal(content(pool, 5), content(pool, 0))


# Namespaces


def test_what_cannot_be_shared_has_another_namespace(backends: Backends, model: Path, tmp_path: Path) -> None:
    def namespace(**settings: Any) -> Any:
        return bind(
            "kv", mha_pool("page_first"), storage_config(None), Options(**{"weights": "w", **settings})
        ).namespace

    served = namespace()
    assert served.layout == "canonical:kv_head_token_layer"
    assert (served.model, served.weights, served.dtype) == ("model", "w", "bfloat16")
    assert namespace(weights="v").difference(served) == {"weights": ("v", "w")}
    other = bind("kv", mha_pool("page_first", dtype=torch.float16), storage_config(None), Options(weights="w"))
    assert other.namespace.difference(served) == {"dtype": ("float16", "bfloat16")}
    serve(tmp_path / "model", {"kv_cache_dtype": "fp8_e5m2"})
    quantised = bind("kv", mha_pool("page_first", dtype=torch.float8_e5m2), storage_config(None), Options(weights="w"))
    assert quantised.namespace.dtype == "sglang:fp8_e5m2:uint8"
    serve(tmp_path / "again" / "model", rope_theta=500000.0)
    assert namespace().difference(served).keys() == {"rope"}
    serve(
        tmp_path / "windows" / "model", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=128
    )
    assert namespace().difference(served)["attention"] == ("sglang_window:128", "gqa")

    pool = fill(mha_pool("page_first"), 1)
    assert all(backends(pool).batch_set_v1(hashes(1), slots(0)))
    assert backends(mha_pool("page_first", dtype=torch.float16)).batch_exists(hashes(1)) == 0


def test_pages_that_are_not_canonical_are_kept_for_the_same_rank_alone(backends: Backends, tmp_path: Path) -> None:
    """Here a pool of fewer layers than the model, as hybrid models have."""
    serve(tmp_path / "hybrid", num_hidden_layers=7)
    pool = fill(mha_pool("page_first"), 1)
    binding = bind("kv", pool, storage_config(pool), Options(weights="w"))
    assert binding.namespace.layout.startswith("opaque:sglang:")
    assert binding.namespace.layout.endswith(":page_first:page16x8192:tp0of1:pp0of1")
    backend = backends(pool)
    assert all(backend.batch_set_v1(hashes(3), slots(0, 1, 2)))
    assert all(backend.batch_get_v1(hashes(3), slots(3, 4, 5)))
    assert torch.equal(content(pool, 3, 4, 5), content(pool, 0, 1, 2))
    assert backends(mha_pool("page_head")).batch_exists(hashes(3)) == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"interface_v1": 0}, "interface_v1"),
        ({"load_timeout": 3.0}, "load_timeout"),
        ({"load_timeout_s": "3"}, "load_timeout_s"),
    ],
)
def test_wrong_settings_are_refused_by_name(backends: Backends, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"hicache_storage_backend_extra_config.{field} "):
        backends(mha_pool("page_first"), **settings)


def test_models_that_cannot_be_served_are_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = mha_pool("page_first")
    with pytest.raises(ConfigError, match="attn_cp_size"):
        bind("kv", pool, storage_config(pool, attn_cp_size=2), Options(weights="w"))
    with pytest.raises(ConfigError, match=r"weights = .* the revision of the weights is unknown"):
        bind("kv", pool, storage_config(pool), Options())
    adapters = SimpleNamespace(enable_lora=True, lora_paths=["/adapters/a"])
    monkeypatch.setattr(geometry, "server_args", lambda: adapters)
    monkeypatch.setattr(geometry, "hashes_name_adapters", lambda: False)
    with pytest.raises(ConfigError, match="do not tell adapters apart"):
        bind("kv", pool, storage_config(pool), Options(weights="w"))
    monkeypatch.setattr(geometry, "hashes_name_adapters", lambda: True)
    assert bind("kv", pool, storage_config(pool), Options(weights="w")).namespace.lora


# Hybrid models: pools beside KV


def test_other_pools_of_a_hybrid_model_have_pages_of_their_own(backends: Backends) -> None:
    kv, window = fill(mha_pool("page_first"), 1), fill(mha_pool("page_first", heads=2), 2)
    backend = backends(kv, [("mamba", window)])
    keys = hashes(6)
    state = PoolTransfer(
        name=PoolName.MAMBA, keys=keys[2:4], host_indices=slots(0, 1), hit_policy=PoolHitPolicy.TRAILING_PAGES
    )
    assert all(backend.batch_set_v1(keys, slots(*range(6))))
    assert backend.batch_set_v2([state], SimpleNamespace(prefix_keys=keys[:2])) == {PoolName.MAMBA: [True, True]}

    found = backend.batch_exists_v2(keys, [state])
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (4, {"kv": 6, "mamba": 4})
    assert getattr(found, "restorable_prefix_pages", [4]) == [4]
    whole = PoolTransfer(name=PoolName.MAMBA, keys=keys[:4], hit_policy=PoolHitPolicy.ALL_PAGES)
    assert backend.batch_exists_v2(keys, [whole]).kv_hit_pages == 0

    back = PoolTransfer(name=PoolName.MAMBA, keys=keys[2:5], host_indices=slots(3, 4, 5))
    assert backend.batch_get_v2([back]) == {PoolName.MAMBA: [True, True, False]}
    assert torch.equal(content(window, 3, 4), content(window, 0, 1))
    assert backend.batch_get_v2([PoolTransfer(name=PoolName.MAMBA, keys=keys[:1])]) == {PoolName.MAMBA: [False]}


def test_states_of_recurrent_layers_are_kept_whole(backends: Backends) -> None:
    """A Mamba pool's page is one state, in a piece for each of its tensors."""
    mamba = pytest.importorskip("sglang.srt.mem_cache.pool_host.mamba")
    info = pytest.importorskip("sglang.srt.mem_cache.device_pool_info")
    states = torch.zeros(3, 8, 4, 16), (torch.zeros(3, 8, 20, dtype=torch.bfloat16),)
    buffers = info.MambaStateBufferInfo(temporal=states[0], conv=states[1])
    pool = mamba.MambaPoolHost(buffers, 2.0, 0, device_capacity=8, pin_memory=False, layout="page_first")
    pool.temporal_buffer.normal_()
    pool.conv_buffer[0].normal_()
    backend = backends(fill(mha_pool("page_first"), 1), [("mamba", pool)])
    keys = hashes(2)
    save = PoolTransfer(name=PoolName.MAMBA, keys=keys, host_indices=torch.tensor([5, 1]))
    assert backend.batch_set_v2([save]) == {PoolName.MAMBA: [True, True]}
    load = PoolTransfer(name=PoolName.MAMBA, keys=keys, host_indices=torch.tensor([2, 7]))
    assert backend.batch_get_v2([load]) == {PoolName.MAMBA: [True, True]}
    for buffer in (pool.temporal_buffer, pool.conv_buffer[0]):
        assert torch.equal(buffer[[2, 7]], buffer[[5, 1]])


@pytest.mark.parametrize(
    ("policy", "keys", "held", "usable"),
    [
        ("ALL_PAGES", 4, "1111", [1, 2, 3, 4]),
        ("ALL_PAGES", 4, "1101", [1, 2]),
        ("ALL_PAGES", 4, "0111", []),
        ("TRAILING_PAGES", 1, "0101", [2, 4]),
        ("TRAILING_PAGES", 2, "0110", [3]),
        ("TRAILING_PAGES", 2, "1011", [1, 4]),
        ("TRAILING_PAGES", 0, "0010", [3]),
    ],
)
def test_the_usable_prefix_follows_the_pools_policy(policy: str, keys: int, held: str, usable: list[int]) -> None:
    transfer = PoolTransfer(name=PoolName.MAMBA, keys=["k"] * keys, hit_policy=PoolHitPolicy[policy])
    found = usable_prefix(4, [transfer], {"mamba": [flag == "1" for flag in held]})
    assert found.kv_hit_pages == max(usable, default=0)
    assert getattr(found, "restorable_prefix_pages", usable) == usable


def test_the_usable_prefix_is_that_of_sglangs_own_file_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(1)
    theirs = HiCacheFile(storage_config(None), str(tmp_path))
    if (
        not hasattr(PoolTransferResult, "restorable_prefix_pages")
        or theirs.batch_exists_v2([]).restorable_prefix_pages is None
    ):
        pytest.skip("older file backends also offer lengths that a pool with trailing pages cannot serve")
    for _ in range(500):
        keys = [f"k{page}" for page in range(source.randint(0, 9))]
        kv_pages = source.randint(0, len(keys))
        transfers = [
            PoolTransfer(
                name=name, keys=["k"] * source.randint(0, 3), hit_policy=source.choice(list(PoolHitPolicy)[:2])
            )
            for name in source.sample([PoolName.MAMBA, PoolName.SWA, PoolName.INDEXER], source.randint(0, 3))
        ]
        held = {str(each.name): [source.random() < 0.8 for _ in range(kv_pages)] for each in transfers}
        there = {f"{theirs._get_component_key(key)}.bin" for key in keys[:kv_pages]}
        for name, pages in held.items():
            there |= {
                f"{theirs._get_component_key(key, name)}.bin" for key, has in zip(keys, pages, strict=False) if has
            }
        monkeypatch.setattr(theirs, "_collect_existing_component_keys", lambda *_, there=there: there)
        found, wanted = usable_prefix(kv_pages, transfers, held), theirs.batch_exists_v2(keys, transfers)
        assert found.kv_hit_pages == wanted.kv_hit_pages
        assert getattr(found, "restorable_prefix_pages", None) == getattr(wanted, "restorable_prefix_pages", None)
        assert wanted.extra_pool_hit_pages.items() <= found.extra_pool_hit_pages.items()


def test_a_kv_pool_without_bytes_follows_the_others(backends: Backends) -> None:
    """As DeepSeek V4's, which only numbers the pages of its compressed pools."""
    hosts = pytest.importorskip("sglang.srt.mem_cache.memory_pool_host")
    if not hasattr(hosts, "LogicalHostPool"):
        pytest.skip("this SGLang has no such pools")

    def paged(name: str, seed: int) -> Any:
        device = [torch.zeros(PAGES // 2, 640, dtype=torch.uint8) for _ in range(LAYERS)]
        pool = hosts.DeepSeekV4PagedHostPool(name, device, 640, PAGES, PAGE, layout="page_first", pin_memory=False)
        return fill(pool, seed)

    compressed, window = paged("deepseek_v4_c4", 1), paged("swa", 2)
    backend = backends(hosts.LogicalHostPool(PAGES * PAGE, PAGE), [("deepseek_v4_c4", compressed), ("swa", window)])
    keys = hashes(6)
    every = PoolTransfer(name=PoolName.DEEPSEEK_V4_C4, keys=keys[:5], host_indices=slots(0, 1, 2, 3, 4))
    last = PoolTransfer(
        name=PoolName.SWA, keys=keys[3:4], host_indices=slots(7), hit_policy=PoolHitPolicy.TRAILING_PAGES
    )
    assert backend.batch_set_v1(keys, slots(*range(6))) == [True] * 6
    assert backend.batch_exists_v2(keys, [every, last]).kv_hit_pages == 0
    assert backend.batch_set_v2([every, last]) == {every.name: [True] * 5, last.name: [True]}

    found = backend.batch_exists_v2(keys, [every, last])
    assert found.kv_hit_pages == 4
    assert found.extra_pool_hit_pages == {"kv": 6, every.name: 5, last.name: 4}
    assert backend.batch_exists(keys) == backend.batch_exists_v2(keys).kv_hit_pages == 0, "nothing says what is stored"
    assert backend.batch_get_v1(keys[:4], slots(0, 1, 2, 3)) == [True] * 4
    wanted = compressed.kv_buffer[:4].clone(), window.kv_buffer[7].clone()
    back = [
        PoolTransfer(name=every.name, keys=keys[:4], host_indices=slots(6, 7, 8, 9)),
        PoolTransfer(name=last.name, keys=keys[3:4], host_indices=slots(2)),
    ]
    assert backend.batch_get_v2(back) == {every.name: [True] * 4, last.name: [True]}
    assert torch.equal(compressed.kv_buffer[6:10], wanted[0])
    assert torch.equal(window.kv_buffer[2], wanted[1])


# Failure


def test_without_a_node_everything_misses_until_one_comes(backends: Backends, tmp_path: Path) -> None:
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool, connected=False, socket=str(tmp_path / "late" / "node.sock"))
    assert backend.batch_exists(hashes(2)) == 0
    assert backend.batch_set_v1(hashes(2), slots(0, 1)) == [False, False]
    assert backend.batch_get_v1(hashes(2), slots(0, 1)) == [False, False]
    assert backend.recorder.counts == {"pages_missed:unavailable": 4, "pages_not_saved:unavailable": 2}
    backend.clear()
    with RunningNode(tmp_path / "late"):
        wait(lambda: all(backend.batch_set_v1(hashes(2), slots(0, 1))))
        assert backend.batch_exists(hashes(2)) == 2
    assert backend.batch_exists(hashes(2)) == 0


@pytest.mark.parametrize(("layout", "allocator"), [("page_first", "default"), ("page_head", "shm")])
def test_a_node_that_hangs_costs_no_more_than_the_deadlines(
    backends: Backends, tmp_path: Path, layout: str, allocator: str
) -> None:
    small = ["host.bytes=16MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB"]
    with NodeProcess(tmp_path, *small) as node:
        limits = {"lookup_timeout_s": 0.05, "load_timeout_s": 0.1, "save_timeout_s": 0.1}
        pool = fill(mha_pool(layout, allocator_type=allocator), 1)
        backend = backends(pool, socket=str(node.socket), allocator=allocator, **limits)
        wait(lambda: all(backend.batch_set_v1(hashes(2), slots(0, 1))))
        process = node.status()["pid"]
        before = dict(backend.recorder.counts)
        os.kill(process, signal.SIGSTOP)
        try:
            assert backend.batch_exists(hashes(2)) == 0
            assert backend.batch_get_v1(hashes(2), slots(2, 3)) == [False, False]
            assert backend.batch_set_v1(hashes(2, 1), slots(0, 1)) == [False, False]
        finally:
            os.kill(process, signal.SIGCONT)
        counts = backend.recorder.counts
        assert counts["pages_missed:deadline"] - before.get("pages_missed:deadline", 0) == 4
        assert counts["pages_not_saved:deadline"] - before.get("pages_not_saved:deadline", 0) == 2
        wait(lambda: backend.batch_exists(hashes(2)) == 2)


def test_a_call_that_makes_no_sense_is_a_miss(backends: Backends) -> None:
    backend = backends(fill(mha_pool("page_first"), 1))
    backend.batch_set_v1(hashes(1), slots(0))
    for wrong in (slots(0, 1), slots(0)[:-1], slots(0) + 1, slots(0) + PAGE * 1000):
        assert backend.batch_get_v1(hashes(1), wrong) == [False]
        assert backend.batch_set_v1(hashes(1, 1), wrong) == [False]
    assert backend.recorder.counts["pages_missed:bad_call"] == 4
    assert backend.batch_exists(["not a hash"]) == 0
    assert backend.recorder.counts["pages_missed:error"] == 1


# Life


def test_clear_empties_the_namespace_and_no_other(backends: Backends) -> None:
    pool = fill(mha_pool("page_first"), 1)
    ours, others = backends(pool), backends(pool, weights="another model's")
    for backend in (ours, others):
        backend.batch_set_v1(hashes(2), slots(0, 1))
    backends(mha_pool("page_first", heads=HEADS // 2), rank=(1, 2)).clear()
    assert ours.batch_exists(hashes(2)) == 2
    ours.clear()
    assert ours.batch_exists(hashes(2)) == 0
    assert others.batch_exists(hashes(2)) == 2


def test_detached_and_attached_again(backends: Backends) -> None:
    pool = fill(mha_pool("page_first"), 1)
    first = backends(pool)
    first.batch_set_v1(hashes(2), slots(0, 1))
    first.close()
    assert first.batch_exists(hashes(2)) == 0
    assert first.batch_get_v1(hashes(2), slots(2, 3)) == first.batch_set_v1(hashes(2), slots(0, 1)) == [False, False]
    again = backends(pool)
    assert all(again.batch_get_v1(hashes(2), slots(2, 3)))
    assert torch.equal(content(pool, 2, 3), content(pool, 0, 1))


def test_sglangs_fault_injection_goes_through_us(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.5")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.002")
    from sglang.srt.mem_cache import hicache_storage

    if not hasattr(hicache_storage, "HiCacheStorageFailureInjector"):
        pytest.skip("this SGLang has no fault injection")
    pool = fill(mha_pool("page_first"), 1)
    backend = backends(pool, connected=False)
    assert type(backend).__name__ == "HiCacheStorageFailureInjector"
    wanted = content(pool, 0, 1)
    loaded = 0
    for _ in range(40):
        backend.batch_set_v1(hashes(2), slots(0, 1))
        loaded += backend.batch_get_v1(hashes(2), slots(2, 3)).count(True)
    assert 0 < loaded < 80
    assert torch.equal(content(pool, 2, 3), wanted)
