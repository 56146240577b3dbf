"""The class SGLang loads: one instance a rank. Everything it does is delegated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from connectors.link import Link
from connectors.sglang.compat import prefix_of
from connectors.sglang.geometry import KV, bind
from connectors.sglang.hooks import OBSERVER
from connectors.sglang.metrics import Recorder
from connectors.sglang.options import Options
from connectors.sglang.pools import limits, usable_prefix
from connectors.sglang.transfers import PoolTransfers
from kvstore.config import default_socket
from kvstore.errors import KVStoreError
from kvstore.node.client import Client
from kvstore.node.launch import launch
from kvstore.node.straight import StraightReads

logger = logging.getLogger("kvstore")

CONNECT_TIMEOUT = 0.5
"""Seconds after which a node that does not greet counts as away: as long as lookups may take, if that is more."""
CLEAR_TIMEOUT = 60.0


class KVStoreStorage(HiCacheStorage):  # type: ignore[misc]
    """HiCache storage backend over the node of this machine. For SGLang 0.5.11 to 0.5.23.

    A setting or a model that cannot be served is refused when SGLang attaches the backend. From then on nothing raises: what
    cannot be had is a miss, what cannot be stored is dropped, and both are counted with a reason.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        self._config = storage_config
        self._options = Options.parse(storage_config.extra_config or {})
        self._socket = self._options.socket or str(default_socket())
        self._pools: dict[str, PoolTransfers] = {}
        self._logical = False
        """Whether the KV pool only numbers pages, all of whose bytes are in the other pools (DeepSeek V4)."""
        self.recorder = Recorder()

    # Attach and detach: SGLang's scheduler thread

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._attach(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._attach(str(host_pool_name), host_pool)

    def close(self) -> None:
        OBSERVER.watch(None)
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def clear(self) -> None:
        """Delete this model's blocks from the node's tiers. One rank does it for all."""
        if not self._leads:
            return
        for name, pool in self._pools.items():
            try:
                pool.clear(CLEAR_TIMEOUT)
            except KVStoreError as error:
                logger.warning("KV store: clearing pool %s: %s", name, error)

    def get_stats(self) -> Any:
        return self.recorder.take()

    # Pages of the KV pool: SGLang's storage threads

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        pool = self._pools.get(KV)
        return pool.prefix(keys, prefix_of(extra_info)) if pool else 0

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys) if self._logical else self._load(KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys) if self._logical else self._save(KV, keys, host_indices, extra_info)

    # Pages of a hybrid model's other pools

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Sequence[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        transfers = pool_transfers or ()
        found_elsewhere = self._logical and any(map(limits, transfers))
        kv_pages = len(keys) if found_elsewhere else self.batch_exists(keys, extra_info)
        held: dict[str, list[bool]] = {}
        for transfer in transfers:
            pool = self._pools.get(str(transfer.name))
            held[str(transfer.name)] = pool.holds(keys[:kv_pages]) if pool else [False] * kv_pages
        return usable_prefix(kv_pages, transfers, held)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {each.name: self._load(str(each.name), each.keys or [], each.host_indices) for each in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {
            each.name: self._save(str(each.name), each.keys or [], each.host_indices, extra_info) for each in transfers
        }

    # The page-by-page calls, which SGLang makes only without interface_v1

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        return None

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[None]:
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return False

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return False

    @property
    def _asks(self) -> bool:
        """Whether this rank's lookups stand for those of all ranks that serve the same requests."""
        return bool(self._config.tp_rank == self._config.pp_rank == 0)

    @property
    def _leads(self) -> bool:
        """Whether this is the first rank of all."""
        return self._asks and getattr(self._config, "dp_rank", 0) == 0

    def _reads_straight(self, pool: Any) -> bool:
        """Whether blocks that only the disk has are read into the pool past the node's memory: SGLang's allocator "shm" says so.

        Of several ranks each would read a block that all of them want.
        """
        return getattr(pool, "fd", None) is not None and self._config.tp_size == 1

    def _load(self, name: str, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        """A pool that was never registered, or is detached, has nothing."""
        pool = self._pools.get(name)
        return pool.load(keys, host_indices) if pool else [False] * len(keys)

    def _save(self, name: str, keys: list[str], host_indices: torch.Tensor, extra_info: Any) -> list[bool]:
        pool = self._pools.get(name)
        return pool.save(keys, host_indices, prefix_of(extra_info)) if pool else [False] * len(keys)

    def _attach(self, name: str, pool: Any) -> None:
        if name in self._pools:
            return
        if name == KV and getattr(pool, "kv_buffer", ...) is None:
            self._logical = True
            return
        binding = bind(name, pool, self._config, self._options)
        start = partial(launch, self._socket) if self._leads and self._options.autostart else None
        client = Client(self._socket, "SGLang", max(CONNECT_TIMEOUT, self._options.lookup_timeout_s))
        link = Link(client, binding.namespace, binding.pages.block_bytes, start)
        straight = StraightReads(client) if self._reads_straight(pool) else None
        self._pools[name] = PoolTransfers(
            name, binding, client, link, self._options, self.recorder, self._asks, straight
        )
        if name == KV and self._asks and self._config.pp_size == 1:  # stages take steps of each other's batches
            OBSERVER.watch(link)
        logger.info("KV store: pool %s, blocks of %d bytes, %s", name, binding.pages.block_bytes, binding.namespace)
