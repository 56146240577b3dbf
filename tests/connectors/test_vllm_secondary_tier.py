"""The secondary tier over a plain memoryview, in the manner of vLLM's own tier tests; the node is real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering")

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingKVEventsConfig,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from connectors.vllm.tier import KVStoreTier, namespace_of
from kvstore.errors import ConfigError
from kvstore.testing.node import PatientClient, RunningNode, wait_for

ROWS, ROW_BYTES = 48, 32 << 10
CONFIG = OffloadingConfig(
    groups=(OffloadingGroupConfig(16, ("layer.0", "layer.1"), 0),),
    worker_kv_bytes_per_block=ROW_BYTES,
    enable_kv_cache_events=False,
    extra_config={},
    engine_id="engine",
    model=OffloadingModelConfig("org/model", "float16"),
    cache=OffloadingCacheConfig(16, 2),
    parallel=OffloadingParallelConfig(0, 2, 2, 1, 1, 1, 0, 1, None, False),
)


def spec(**changes: Any) -> Any:
    config = replace(CONFIG, **changes)
    events = OffloadingKVEventsConfig(enable_kv_cache_events=True, self_describing_kv_events=False)
    sizes = {"blocks_per_chunk": 2, "tokens_per_block": (16,), "tokens_per_hash": 16}
    return SimpleNamespace(config=config, kv_events_config=events, **sizes)


class Bench:
    """A tier over its own primary memory, driven as vLLM's scheduler drives it."""

    def __init__(self, node: RunningNode, **settings: Any) -> None:
        self.primary = np.zeros((ROWS, ROW_BYTES), np.uint8)
        settings = {"socket": str(node.socket), "autostart": False, "weights": "w", **settings}
        self.tier = KVStoreTier(spec(), memoryview(self.primary), "KVStoreTier", **settings)
        self._jobs = 0

    def fill(self, count: int) -> np.ndarray:
        """The first rows, each with bytes of its own."""
        self.primary[:count] = np.random.default_rng(0).integers(0, 256, (count, ROW_BYTES), dtype=np.uint8)
        return self.primary[:count].copy()

    def move(self, keys: list[Any], rows: list[int], load: bool) -> JobResult:
        self._jobs += 1
        job = TransferJob(self._jobs, keys, np.array(rows), load, ReqContext("r"))
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        assert self.tier.has_pending_work()
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self._jobs
        return result

    def lookup(self, keys: list[Any], request: str = "r") -> list[LookupResult]:
        context = ReqContext(request)
        self.tier.on_new_request(context)
        assert {self.tier.lookup(key, context) for key in keys} == {LookupResult.RETRY}
        self.tier.on_schedule_end(ScheduleEndContext((), ()))

        def settled() -> bool:
            self.tier.on_schedule_end(ScheduleEndContext((), ()))
            return all(self.tier.lookup(key, context) is not LookupResult.RETRY for key in keys)

        wait_for(settled)
        found = [self.tier.lookup(key, context) for key in keys]
        self.tier.on_request_finished(context)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with RunningNode(tmp_path) as running:
        yield running


@pytest.fixture
def bench(node: RunningNode) -> Iterator[Bench]:
    bench = Bench(node)
    yield bench
    bench.tier.shutdown()


def flushed(tier: KVStoreTier, wanted: list[Any], context: ReqContext) -> list[LookupResult]:
    """What the tier says with the next step."""
    tier.on_schedule_end(ScheduleEndContext((), ()))
    return [tier.lookup(key, context) for key in wanted]


def flip_on_disk(folder: Path, pattern: bytes) -> None:
    """Flip a bit of the one file that has ``pattern``."""
    for segment in folder.rglob("*"):
        if segment.is_file() and (place := segment.read_bytes().find(pattern)) >= 0:
            with open(segment, "r+b") as file:
                file.seek(place + 100)
                file.write(bytes([pattern[100] ^ 1]))
            return
    pytest.fail("the row is not on the disk")


def keys(count: int, group: int = 0) -> list[Any]:
    return [make_offload_key(bytes([number]) * 32, group) for number in range(count)]


def test_rows_come_back_to_other_rows(bench: Bench) -> None:
    bench.primary[:4] = np.random.default_rng(0).integers(0, 256, (4, ROW_BYTES), dtype=np.uint8)
    stored = bench.move(keys(4), [0, 1, 2, 3], load=False)
    assert stored.success
    assert stored.transfer_bytes == 4 * ROW_BYTES
    assert bench.lookup([*keys(5), *keys(1, group=1)]) == [LookupResult.HIT] * 4 + [LookupResult.MISS] * 2
    assert bench.move(keys(4), [9, 8, 7, 6], load=True).success
    assert np.array_equal(bench.primary[[9, 8, 7, 6]], bench.primary[:4])
    assert not bench.primary[[4, 5, 10]].any()


def test_storing_again_is_no_failure(bench: Bench) -> None:
    assert bench.move(keys(2), [0, 1], load=False).success
    assert bench.move(keys(2), [0, 1], load=False).success


def test_of_a_load_that_fails_in_part_the_rest_is_kept(bench: Bench) -> None:
    bench.primary[0] = 7
    bench.move(keys(1), [0], load=False)
    result = bench.move(keys(3), [4, 5, 6], load=True)
    assert not result.success
    assert list(result.successful_keys or ()) == keys(1)
    assert bench.primary[4].all()
    assert not bench.primary[5:7].any()


def test_what_was_saved_outlives_the_node(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        first = Bench(node)
        rows = first.fill(3)
        first.move(keys(3), [0, 1, 2], load=False)
        first.tier.shutdown()
    with RunningNode(tmp_path) as node:
        second = Bench(node)
        assert second.lookup(keys(4)) == [LookupResult.HIT] * 3 + [LookupResult.MISS]
        assert second.move(keys(3), [5, 6, 7], load=True).success
        assert np.array_equal(second.primary[5:8], rows)
        second.tier.shutdown()


def test_a_flipped_bit_is_a_miss_of_one_row_and_storing_again_heals(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        first = Bench(node)
        rows = first.fill(3)
        first.move(keys(3), [0, 1, 2], load=False)
        first.tier.shutdown()
    flip_on_disk(tmp_path / "disk", rows[1].tobytes()[:512])
    with RunningNode(tmp_path) as node:
        second = Bench(node)
        context = ReqContext("r")
        assert {second.tier.lookup(key, context) for key in keys(3)} == {LookupResult.RETRY}
        wait_for(lambda: flushed(second.tier, keys(3), context) == [LookupResult.HIT] * 3)
        result = second.move(keys(3), [5, 6, 7], load=True)
        assert not result.success
        assert list(result.successful_keys or ()) == [keys(3)[0], keys(3)[2]]
        assert np.array_equal(second.primary[[5, 7]], rows[[0, 2]])
        assert not second.primary[6].any(), "bytes that did not verify were not delivered"
        after = [LookupResult.HIT, LookupResult.MISS, LookupResult.HIT]
        assert flushed(second.tier, keys(3), context) == after, "vLLM is told at once, or it would ask for ever"
        second.primary[1] = rows[1]
        assert second.move(keys(3), [5, 1, 7], load=False).success
        assert second.move(keys(3), [8, 9, 10], load=True).success
        assert np.array_equal(second.primary[8:11], rows)
        second.tier.shutdown()


def test_tiers_stay_under_their_caps_and_still_take_what_is_new(tmp_path: Path) -> None:
    caps = {"host": 1 << 20, "disk": 2 << 20}
    sizes = ("host.bytes=1MiB", "host.extent_bytes=256KiB", "disk.bytes=2MiB", "disk.segment_bytes=1MiB")
    with RunningNode(tmp_path, *sizes) as node:
        bench = Bench(node)
        for start in range(0, 160, 8):  # 5 MiB
            bench.primary[:8] = start + 1
            bench.move(keys(160)[start : start + 8], list(range(8)), load=False)
            with PatientClient(node.socket) as client:
                assert client.call("drain", 35.0, timeout=30.0)["drained"]
                for tier in client.call("status")["tiers"]:
                    assert tier["used_bytes"] <= caps[tier["medium"]]
        assert bench.lookup(keys(160)[-8:]) == [LookupResult.HIT] * 8
        assert bench.lookup(keys(160)).count(LookupResult.HIT) < 100
        bench.tier.shutdown()


def test_a_load_may_be_larger_than_the_nodes_memory(tmp_path: Path) -> None:
    with RunningNode(tmp_path, "host.bytes=1MiB", "host.extent_bytes=256KiB") as node:
        bench = Bench(node)
        rows = bench.fill(ROWS)
        for row in range(0, ROWS, 4):
            bench.move(keys(ROWS)[row : row + 4], list(range(row, row + 4)), load=False)
            with PatientClient(node.socket) as client:
                client.call("drain", 35.0, timeout=30.0)
        bench.primary[:] = 0
        assert bench.move(keys(ROWS), list(range(ROWS)), load=True).success
        assert np.array_equal(bench.primary, rows)
        bench.tier.shutdown()


def test_two_engines_share_what_one_of_them_stored(node: RunningNode, bench: Bench) -> None:
    rows = bench.fill(2)
    bench.move(keys(2), [0, 1], load=False)
    other = Bench(node)
    assert other.lookup(keys(2)) == [LookupResult.HIT] * 2
    assert other.move(keys(2), [3, 4], load=True).success
    assert np.array_equal(other.primary[3:5], rows)
    other.tier.shutdown()
    stranger = Bench(node, weights="another revision")
    assert stranger.lookup(keys(2)) == [LookupResult.MISS] * 2
    stranger.tier.shutdown()


def test_vllms_events_name_what_was_stored_and_what_a_load_missed(node: RunningNode, bench: Bench) -> None:
    telling = Bench(node, enable_kv_events=True, locality="REMOTE")
    telling.move(keys(2), [0, 1], load=False)
    telling.move(keys(3), [3, 4, 5], load=True)
    told = [(event.keys, event.removed, event.medium, event.locality) for event in telling.tier.take_events()]
    where = Medium.STORAGE, Locality.REMOTE
    assert told == [(keys(2), False, *where), (keys(3)[2:], True, *where)]
    assert list(telling.tier.take_events()) == []
    telling.tier.shutdown()
    bench.move(keys(2), [0, 1], load=False)
    assert list(bench.tier.take_events()) == [], "nobody asked"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"sokket": "x"}, r"secondary_tiers\.sokket.*Known: socket"),
        ({"load_timeout_s": "10"}, "load_timeout_s.*not a float"),
        ({"locality": "NEAR"}, "locality.*LOCAL, REMOTE"),
    ],
)
def test_bad_settings_are_named(node: RunningNode, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Bench(node, **extra)


def test_without_a_node_nothing_raises_and_nothing_is_found(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        bench = Bench(node)
        bench.move(keys(2), [0, 1], load=False)
    assert bench.lookup(keys(2)) == [LookupResult.MISS] * 2
    assert not bench.move(keys(2), [0, 1], load=True).success
    assert not bench.move(keys(2), [0, 1], load=False).success
    bench.tier.shutdown()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": OffloadingModelConfig("org/model", "bfloat16")},
        {"model": OffloadingModelConfig("other/model", "float16")},
        {"groups": (OffloadingGroupConfig(16, ("layer.0",), 0),)},
        {"cache": OffloadingCacheConfig(32, 2)},
        {"parallel": replace(CONFIG.parallel, tp_size=4)},
        {"canonical_layout": True, "kv_cache_layout": "LBHNC"},
        {"kv_cache_layout": "LBNHC"},
    ],
)
def test_whatever_shapes_a_row_is_in_its_namespace(changes: dict[str, Any]) -> None:
    assert namespace_of(spec(**changes), ROW_BYTES, "w") != namespace_of(spec(), ROW_BYTES, "w")


@pytest.mark.parametrize("portable", [True, False])
def test_engines_of_another_degree_share_rows_that_vllm_says_do_not_depend_on_it(portable: bool) -> None:
    def at(degree: int) -> Any:
        parallel = replace(CONFIG.parallel, tp_size=degree, world_size=degree, is_parallelism_agnostic=portable)
        return spec(parallel=parallel, canonical_layout=portable, kv_cache_layout="LBHNC")

    two, four = (namespace_of(at(degree), ROW_BYTES, "w") for degree in (2, 4))
    assert (two == four) is portable


def test_weights_and_row_size_are_in_the_namespace() -> None:
    names = {namespace_of(spec(), *rest) for rest in ((ROW_BYTES, "w"), (ROW_BYTES, "v"), (2 * ROW_BYTES, "w"))}
    assert len(names) == 3


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights"):
        namespace_of(spec(), ROW_BYTES, "")
