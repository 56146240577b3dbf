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

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
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
from kvstore.testing.node import RunningNode, wait_for

ROWS, ROW_BYTES = 16, 32 << 10
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
    return SimpleNamespace(config=config, blocks_per_chunk=2, tokens_per_block=(16,), tokens_per_hash=16)


class Bench:
    """A tier over its own primary memory, driven as vLLM's scheduler drives it."""

    def __init__(self, node: RunningNode, **settings: Any) -> None:
        self.primary = np.zeros((ROWS, ROW_BYTES), np.uint8)
        settings = {"socket": str(node.socket), "autostart": False, "weights": "w", **settings}
        self.tier = KVStoreTier(spec(), memoryview(self.primary), "KVStoreTier", **settings)
        self._jobs = 0

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

        wait_for(settled, 10)
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
        {"groups": (OffloadingGroupConfig(16, ("layer.0",), 0),)},
        {"cache": OffloadingCacheConfig(32, 2)},
        {"parallel": replace(CONFIG.parallel, tp_size=4)},
        {"canonical_layout": True, "kv_cache_layout": "LBHNC"},
        {"kv_cache_layout": "LBNHC"},
    ],
)
def test_whatever_shapes_a_row_is_in_its_namespace(changes: dict[str, Any]) -> None:
    assert namespace_of(spec(**changes), ROW_BYTES, "w") != namespace_of(spec(), ROW_BYTES, "w")


def test_weights_and_row_size_are_in_the_namespace() -> None:
    names = {namespace_of(spec(), *rest) for rest in ((ROW_BYTES, "w"), (ROW_BYTES, "v"), (2 * ROW_BYTES, "w"))}
    assert len(names) == 3


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights"):
        namespace_of(spec(), ROW_BYTES, "")
