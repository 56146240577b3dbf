"""SGLang's cache tree and controller over the backend: what one instance computed a second one finds; and a backend's life."""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA

pytest.importorskip("sglang.test.kits.unified_radix_cache")  # 0.5.23

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.fixtures import drop_hicache_atexit_pin, match_prefix
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from kvstore.testing.node import PatientClient, RunningNode, wait_for

PLAIN = CacheConfig(
    page_size=64, components=(ComponentType.FULL,), num_layers=4, head_num=8, head_dim=128, kv_size=2048, max_context_len=2048
)  # fmt: skip


class OverOurStorage(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """SGLang's own fixtures make the caches; ``_init_hicache`` gives each of them our backend."""

    cfg = PLAIN
    layout = "page_first_direct"

    def setUp(self) -> None:
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        cfg = self.cfg
        changes = {"num_hidden_layers": cfg.num_layers, "num_key_value_heads": cfg.head_num, "head_dim": cfg.head_dim}
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        self.node = RunningNode(folder, "host.bytes=128MiB", "host.extent_bytes=16MiB")
        self.addCleanup(self.node.stop)
        self.backends: list[Any] = []

    def extra_config(self) -> str:
        return json.dumps(
            {
                "backend_name": "kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreStorage",
                "interface_v1": 1, "hicache_storage_pass_prefix_keys": True, "prefetch_threshold": 1,
                "socket": str(self.node.socket), "autostart": False, "weights": "w", "lookup_timeout_s": 10.0,
            }
        )  # fmt: skip

    def _init_hicache(self, cache: Any, **_: Any) -> None:
        """Called by the base class for each cache instance."""
        context = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        arguments = ServerArgs(
            model_path=str(self.model), device="cpu", page_size=self.cfg.page_size, hicache_io_backend="direct",
            hicache_mem_layout=self.layout, hicache_write_policy="write_through", hicache_ratio=2.0,
            hicache_storage_backend="dynamic", hicache_storage_backend_extra_config=self.extra_config(),
            hicache_storage_prefetch_policy="wait_complete",
        )  # fmt: skip
        arguments._mamba_cache_chunk_size = 64
        set_global_server_args_for_scheduler(arguments)
        cache.init_hicache(arguments, cache.cache_init_params)
        self.addCleanup(drop_hicache_atexit_pin, cache)
        self.addCleanup(cache.release_host_resources)
        self.addCleanup(cache.cache_controller._stop_storage_threads)
        cache.write_through_threshold = 1 << 30
        cache.load_back_threshold = 0
        controller = cache.cache_controller
        controller.prefetch_capacity_limit = max(controller.prefetch_capacity_limit, controller.mem_pool_host.size)
        self.connected(cache)

    def connected(self, cache: Any) -> None:
        backend = cache.cache_controller.storage_backend
        self.backends.append(backend)
        wait_for(lambda: all(pool._link.keyring is not None for pool in backend._pools.values()))

    def loaded(self, cache: Any, tokens: list[int], name: str) -> int:
        """Prefetch; how many tokens there are then on the device or the host."""
        self._consume_prefetch(cache, tokens, CacheRequestHandle(name, 0))
        match = match_prefix(cache, tokens)
        return int(match.device_prefix_len + match.host_hit_length)

    def test_a_new_instance_reads_what_the_first_one_wrote(self) -> None:
        tokens = self._make_seq(1, 8)
        keys, values = self._l3_produce("", tokens, marker=7)
        consumer, allocator, _ = self._l3_consumer("")
        assert self.loaded(consumer, tokens, "first") == len(tokens)
        match = match_prefix(consumer, tokens)
        self._load_back_node(consumer, match.last_host_node)
        match = match_prefix(consumer, tokens)
        assert match.device_prefix_len == len(tokens)
        k, v = self._snapshot_full_kv(allocator, consumer.path_device_indices(match.last_device_node))
        assert torch.equal(k, keys)
        assert torch.equal(v, values)

    def test_clear_detach_and_attach_at_run_time(self) -> None:
        tokens = self._make_seq(1, 8)
        self._l3_produce("", tokens, marker=7)
        consumer, _, _ = self._l3_consumer("")
        storage = consumer._storage_attachment
        held, connected = len(self.backends[-1]._pools), self.connections()
        detached, why = storage.detach()
        assert detached, why
        wait_for(lambda: self.connections() == connected - held)
        attached, why = storage.attach(
            storage_backend="dynamic", storage_backend_extra_config_json=self.extra_config(), served_model_name="m",
            hicache_storage_prefetch_policy="wait_complete", hicache_write_policy="write_through",
        )  # fmt: skip
        assert attached, why
        self.connected(consumer)
        assert consumer.cache_controller.clear_storage_backend()
        consumer.prefetch_from_storage(CacheRequestHandle("r", 0), consumer.root_node_handle(), tokens, None, None)
        assert match_prefix(consumer, tokens).host_hit_length == 0

    def connections(self) -> int:
        with PatientClient(self.node.socket) as client:
            return sum(each["name"] == "SGLang" for each in client.call("status")["clients"])


class LayerFirst(OverOurStorage):
    layout = "layer_first"


class SlidingWindows(OverOurStorage):
    """A hybrid model: SGLang asks for two pools, of which the window's counts from its end."""

    cfg = CacheConfig(
        page_size=16, components=(ComponentType.FULL, ComponentType.SWA), sliding_window_size=32, kv_size=1024,
        max_context_len=1024,
    )  # fmt: skip

    def test_a_new_instance_reads_what_the_first_one_wrote(self) -> None:
        super().test_a_new_instance_reads_what_the_first_one_wrote()
        saved = {name for backend in self.backends for name in backend.recorder.counts}
        assert {f"bytes_{verb}:{pool}" for verb in ("saved", "loaded") for pool in ("kv", "swa")} <= saved
