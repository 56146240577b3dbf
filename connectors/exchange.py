"""Whole payloads in and out of a node: for hosts that hand over bytes and keys, not an engine's pages.

The bytes stay opaque: they go back only to where they came from. One copy between the caller's buffer and the node's arena.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.errors import KVStoreError, NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import Miss, NewBlock
from kvstore.node.arena import Arena
from kvstore.node.client import Client

logger = logging.getLogger("kvstore")

LOOKUP_SECONDS = 1.0
RESERVE_SECONDS = 5.0
COMMIT_SECONDS = 10.0
ASKED_SHARE = 0.25
"""Of the node's host memory that a load asks for at a time: all of it may be more than there is room for."""

Bytes = npt.NDArray[np.uint8]
"""A flat, contiguous buffer of the caller."""


class Exchange:
    """Payloads of one size in one namespace, by digest. Thread-safe, blocking; the copies release the interpreter lock.

    Nothing raises: what could not be done is False in the answer, and counted in ``misses`` by its reason.
    """

    def __init__(
        self,
        client: Client,
        namespace: Namespace,
        block_bytes: int,
        load_seconds: float = 10.0,
        start_node: Callable[[], None] | None = None,
    ) -> None:
        """``client`` may serve several exchanges and stays the caller's; ``load_seconds`` is the deadline of a load.

        ``start_node`` is called when no node answers, and need not wait for it.
        """
        self.misses: Counter[str] = Counter()
        self.block_bytes = block_bytes
        self._client = client
        self._namespace = namespace
        self._load_seconds = load_seconds
        self._start_node = start_node
        self._lock = threading.Lock()
        self._epoch = 0
        self._keys_of: Callable[[Sequence[bytes]], list[BlockKey]] | None = None

    def contains(self, digests: Sequence[bytes]) -> list[bool]:
        """Which payloads some tier of the node holds. One round trip; the digests, in order, count as one prompt."""
        try:
            return self._client.holds(self._keys(digests), LOOKUP_SECONDS, self._namespace)
        except KVStoreError as error:
            return self._lost(error, len(digests))

    def holds(self, digests: Sequence[bytes]) -> list[bool]:
        """Like ``contains``, but does not count as a use."""
        try:
            return self._client.holds(self._keys(digests), LOOKUP_SECONDS)
        except KVStoreError as error:
            return self._lost(error, len(digests))

    def lease(self, digests: Sequence[bytes]) -> list[bool]:
        """Bring payloads to the arena and keep them there until ``unlease``, which is owed for each that is True."""
        leased = [False] * len(digests)
        try:
            for start, _, offsets in self._runs(self._keys(digests), held=True):
                leased[start : start + len(offsets)] = [True] * len(offsets)
        except KVStoreError as error:
            self._lost(error, leased.count(False))
        return leased

    def unlease(self, digests: Sequence[bytes]) -> None:
        """Return leases. Those of a node that went away are gone with it."""
        try:
            self._client.release(self._keys(digests))
        except KVStoreError as error:
            self._lost(error, 0)

    def load(self, digests: Sequence[bytes], buffers: Sequence[Bytes]) -> list[bool]:
        """Fill each buffer (of ``block_bytes``) whose payload is there and whole; the others are left alone.

        Together they may be more than the arena holds: what was copied makes room for the rest.
        """
        loaded = [False] * len(digests)
        try:
            keys = self._keys(digests)
            for start, arena, offsets in self._runs(keys):
                try:
                    for place, offset in enumerate(offsets, start):
                        np.copyto(buffers[place], self._payload(arena, offset))
                        loaded[place] = True
                finally:
                    self._client.release(keys[start : start + len(offsets)])
        except KVStoreError as error:
            self._lost(error, loaded.count(False))
        return loaded

    def save(self, digests: Sequence[bytes], buffers: Sequence[Bytes]) -> list[bool]:
        """Store the buffers (of ``block_bytes``); True for those that the node holds now, whoever stored them."""
        try:
            keys = self._keys(digests)
            blocks = [NewBlock(key, NO_PARENT, 0) for key in keys]
            reserved = self._client.reserve(self._namespace, blocks, timeout=RESERVE_SECONDS)
            granted = [place for place, offset in enumerate(reserved.offsets) if offset is not None]
            for place in granted:
                np.copyto(self._payload(reserved.arena, reserved.offsets[place]), buffers[place])
            self.misses.update(miss.value for miss in reserved.misses.values())
            published = set(self._client.commit([keys[place] for place in granted], timeout=COMMIT_SECONDS))
        except KVStoreError as error:
            return self._lost(error, len(digests))
        return [key in published or reserved.misses.get(place) is Miss.PRESENT for place, key in enumerate(keys)]

    def delete(self, digests: Sequence[bytes]) -> bool:
        """Delete from every tier; False when the node did not answer. Whoever holds a lease may read on."""
        try:
            self._client.delete(self._keys(digests))
        except KVStoreError as error:
            self._lost(error, len(digests))
            return False
        return True

    def _payload(self, arena: Arena, offset: int | None) -> Bytes:
        assert offset is not None
        return np.frombuffer(arena.slot(offset, self.block_bytes), np.uint8)

    def _runs(self, keys: Sequence[BlockKey], held: bool = False) -> Iterator[tuple[int, Arena, tuple[int, ...]]]:
        """Acquire every key that can be had: leased runs as (first position, arena, offsets).

        Unless they are ``held``, each is released before the next is asked for.
        """
        most = len(keys) if held else max(int(self._client.arena.nbytes * ASKED_SHARE) // self.block_bytes, 1)
        start, deadline = 0, time.monotonic() + self._load_seconds
        while start < len(keys):
            acquired = self._client.acquire(keys[start : start + most], max(deadline - time.monotonic(), 0.0))
            yield start, acquired.arena, acquired.offsets
            start += len(acquired.offsets)
            if acquired.miss is None:
                continue
            self.misses[acquired.miss.value] += 1
            if acquired.miss in (Miss.DEADLINE, Miss.UNAVAILABLE):
                break
            start += 1  # one payload is not there: those behind it may be

    def _keys(self, digests: Sequence[bytes]) -> list[BlockKey]:
        """Block keys, under the secret of the node that runs now. Raises NodeUnavailable, ConfigError, IdentityError."""
        with self._lock:
            if self._keys_of is None or self._client.epoch != self._epoch:
                self._keys_of = self._client.open_namespace(self._namespace, self.block_bytes).block_keys
                arena, self._epoch = self._client.arena, self._client.epoch
                threading.Thread(target=arena.populate, name="kvstore-populate", daemon=True).start()
            return self._keys_of(digests)

    def _lost(self, error: KVStoreError, count: int) -> list[bool]:
        reason = Miss.UNAVAILABLE.value if isinstance(error, NodeUnavailable) else type(error).__name__
        if not self.misses[reason]:
            logger.warning("KV store: %s", error)
        self.misses[reason] += count
        if isinstance(error, NodeUnavailable) and self._start_node is not None:
            try:
                self._start_node()
            except KVStoreError as failure:
                logger.warning("KV store: starting a node failed: %s", failure)
                self._start_node = None
        return [False] * count
