"""LMCache's full L2 adapter interface: ``native_plugin`` and, beyond it, locks that hold, a listing, and a status."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from connectors.lmcache.chunks import Chunks
from connectors.lmcache.connector import flat
from connectors.lmcache.names import Names
from connectors.lmcache.options import Options
from kvstore import tracing

BATCH = 1000
"""Names of which the node is asked at a time, for a listing."""
MOST_BATCHES = 10
"""Of one page: what the node has given up is named for a while, and passed over."""
LAST = "\U0010ffff"
"""Comes after every name."""


class KVStoreAdapter(L2AdapterInterface):  # type: ignore[misc]
    """An adapter over the node of this machine. Any thread may call; only ``delete``, ``list_l2_keys`` and ``close`` block.

    A lookup leases the chunks it finds, as far as a quarter of the node's host memory goes: they are brought there and stay until
    unlocked. What is found beyond that is reported, too, and loaded from where it is. Room is the node's affair (hard caps,
    eviction by learnt reuse): LMCache is told of no capacity, so it does not evict here.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, l1_memory_desc: Any = None, **_: Any) -> None:
        """``config`` is ``adapter_params``. Raises ConfigError for settings that do not exist."""
        super().__init__(max_capacity_bytes=0)
        options = Options.parse(dict(config or {}))
        self._chunks = Chunks(options)
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="kvstore")
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._stores: dict[int, L2StoreResult] = {}
        self._lookups: dict[int, Bitmap] = {}
        self._loads: dict[int, Bitmap] = {}
        self._stored, self._looked_up, self._loaded = (create_event_notifier() for _ in range(3))
        space = f"{options.weights}|{options.dtype}|{options.chunk_tokens}"
        self._named = Names(options.names_file, space)

    def get_store_event_fd(self) -> int:
        return int(self._stored.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._looked_up.fileno())

    def get_load_event_fd(self) -> int:
        return int(self._loaded.fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        names, buffers = _names(keys), [flat(item.byte_array) for item in objects]
        sizes = [buffer.nbytes for buffer in buffers]

        def work() -> L2StoreResult:
            stored = self._chunks.save(names, buffers)
            kept = [place for place, well in enumerate(stored) if well]
            if kept:
                self._named.add([(names[place], sizes[place]) for place in kept])
                self._notify_keys_stored([keys[place] for place in kept], [sizes[place] for place in kept])
            return L2StoreResult(all(stored), sum(sizes) if all(stored) else 0)

        return self._submit(work, lambda: L2StoreResult(False, 0), self._stores, self._stored)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            done = dict(self._stores)
            self._stores.clear()
        return done

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        names = _names(keys)

        def work() -> Bitmap:
            self._chunks.expect(names, {group: _bytes_of(layout) for group, layout in group_layout_descs.items()})
            with tracing.span("connector lock", blocks=len(names)):
                found = self._chunks.contains(names)
                here = [name for name, held in zip(names, found, strict=True) if held]
                unsure = [name for name, leased in zip(here, self._chunks.lease(here), strict=True) if not leased]
                gone = {name for name, held in zip(unsure, self._chunks.holds(unsure), strict=True) if not held}
            return _bitmap([held and name not in gone for name, held in zip(names, found, strict=True)])

        return self._submit(work, lambda: Bitmap(len(keys)), self._lookups, self._looked_up)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._lookups.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._pool.submit(self._chunks.unlease, _names(keys))

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        names, buffers = _names(keys), [flat(item.byte_array) for item in objects]

        def work() -> Bitmap:
            loaded = self._chunks.load(names, buffers)
            self._named.add([(n, b.nbytes) for n, b, well in zip(names, buffers, loaded, strict=True) if well])
            self._notify_keys_accessed([key for key, well in zip(keys, loaded, strict=True) if well])
            return _bitmap(loaded)

        return self._submit(work, lambda: Bitmap(len(keys)), self._loads, self._loaded)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._loads.pop(task_id, None)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete from every tier of the node; a chunk that is locked goes when it is unlocked."""
        names = _names(keys)
        done = self._chunks.delete(names)
        sizes = self._named.remove([name for name, well in zip(names, done, strict=True) if well])
        gone = [(key, sizes[name]) for key, name in zip(keys, names, strict=True) if name in sizes]
        if gone:
            self._notify_keys_deleted([key for key, _ in gone], [size for _, size in gone])

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """What the node holds of the chunks that LMCache servers of this machine have stored or loaded, by name.

        A page may have fewer entries than ``page_size``, or none, and yet not be the last one.
        """
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be positive")
        at, end = ("", LAST) if model_name is None else (model_name + "@", model_name + "A")  # "A" comes after "@"
        at = max(at, cursor or "")
        entries: list[KeyEntry] = []
        for _ in range(MOST_BATCHES):
            named = self._named.between(at, end, BATCH)
            if not named:
                return KeyListPage(tuple(entries), None)
            held = self._chunks.holds([name for name, _ in named])
            for (at, size), here in zip(named, held, strict=True):
                if here:
                    entries.append(KeyEntry(_key(at), size))
                if len(entries) == page_size:
                    return KeyListPage(tuple(entries), at)
        return KeyListPage(tuple(entries), at)

    def report_status(self) -> dict[str, Any]:
        """Whether the node answers, and why chunks were missed since the start."""
        return {"is_healthy": self._chunks.is_healthy(), "misses": dict(self._chunks.misses)}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._chunks.close()
        self._named.close()
        for notifier in (self._stored, self._looked_up, self._loaded):
            notifier.close()

    def _submit(self, work: Callable[[], Any], failed: Callable[[], Any], results: dict[int, Any], done: Any) -> int:
        task = next(self._ids)

        def run() -> None:
            try:
                result = work()
            except Exception:  # LMCache waits for every task, whatever happens
                result = failed()
            with self._lock:
                results[task] = result
            done.notify()

        self._pool.submit(run)
        return task


def _names(keys: Sequence[ObjectKey]) -> list[str]:
    """The text form of keys that ``native_plugin`` uses, so that both adapters share their chunks."""
    return [
        "@".join(
            (
                key.model_name,
                f"{key.kv_rank:08x}",
                f"{key.object_group_id:x}",
                key.chunk_hash.hex(),
                *((key.cache_salt,) if key.cache_salt else ()),
            )
        )
        for key in keys
    ]


def _key(name: str) -> EncodedObjectKey:
    """What ``_names`` made the name from."""
    model, rank, group, digest, *salt = name.split("@")
    return EncodedObjectKey(digest, model, int(rank, 16), int(group, 16), "".join(salt))


def _bytes_of(layout: MemoryLayoutDesc) -> int:
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))


def _bitmap(flags: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(flags))
    for place, flag in enumerate(flags):
        if flag:
            bitmap.set(place)
    return bitmap
