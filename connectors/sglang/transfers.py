"""Moves pages of one host pool to and from the node. SGLang's storage threads call; each call has a deadline, none raises."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

import torch

from connectors.link import Link
from connectors.sglang.hooks import OBSERVER
from connectors.sglang.options import Options
from connectors.sglang.pages import Place
from kvstore.errors import DeadlineExceeded, IdentityError, KVStoreError
from kvstore.identity import NO_PARENT, BlockKey, Keyring
from kvstore.node.api import About, Acquired, Miss, NewBlock
from kvstore.node.client import Client
from kvstore.node.straight import StraightReads
from kvstore.tiers.base import Medium

if TYPE_CHECKING:
    from connectors.sglang.geometry import Binding
    from connectors.sglang.metrics import Recorder

logger = logging.getLogger("kvstore")

CHUNK_BYTES = 32 << 20
"""Of payload leased or reserved at a time: enough to hide a round trip, little enough to leave the arena to others."""

AHEAD = 2
"""Chunks that the node brings while one is copied: a disk that waits for the next to be asked for stands still."""

T = TypeVar("T")


class PoolTransfers:
    """Lookups, loads and saves of one pool. Thread-safe; copies release the interpreter lock."""

    def __init__(
        self,
        name: str,
        binding: Binding,
        client: Client,
        link: Link,
        options: Options,
        recorder: Recorder,
        leads: bool = True,
        straight: StraightReads | None = None,
    ) -> None:
        """``link`` keeps ``client`` connected; both are closed with this, and so is ``straight``, which reads what it can.

        SGLang asks on every rank and takes the least of the answers: what the rank that ``leads`` asks counts as the request,
        and the node plans for it alone.
        """
        self._name = name
        self._client = client
        self._link = link
        self._binding = binding
        self._bytes = binding.pages.block_bytes
        self._chunk = max(1, min(128, CHUNK_BYTES // self._bytes))
        self._options = options
        self._recorder = recorder
        self._leads = leads
        self._straight = straight
        self._acquires = ThreadPoolExecutor(AHEAD, f"kvstore-{name}")
        link.on_node(self._prepare)

    def prefix(self, hashes: Sequence[str], before: Sequence[str]) -> int:
        """How many of ``hashes`` to load, from the first on: those that are stored, or as many of them as the node advises.

        ``before`` are the prompt's hashes ahead of them.
        """

        def ask(keyring: Keyring) -> int:
            keys = keyring.block_keys(map(bytes.fromhex, (*before, *hashes)))
            timeout = self._options.lookup_timeout_s
            if not self._leads:
                return leading(self._client.holds(keys[len(before) :], timeout))
            about = About(OBSERVER.request) if OBSERVER.request else None
            found = self._client.lookup(keys, len(before), timeout, about, OBSERVER.waiting)
            return found.plan.blocks if found.plan else found.blocks

        return self._asked(ask, 0, len(hashes))

    def holds(self, hashes: Sequence[str]) -> list[bool]:
        """Which of ``hashes`` are stored, each by itself."""

        def ask(keyring: Keyring) -> list[bool]:
            keys = keyring.block_keys(map(bytes.fromhex, hashes))
            counted = self._binding.namespace if self._leads else None
            return self._client.holds(keys, self._options.lookup_timeout_s, counted)

        return self._asked(ask, [False] * len(hashes), len(hashes))

    def load(self, hashes: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """Fill the pages at ``host_indices``; stops at the first page that cannot be had."""
        started = time.perf_counter()
        good = 0
        try:
            keyring = self._keyring()
            places = self._binding.pages.places(host_indices, len(hashes))
            keys = keyring.block_keys(map(bytes.fromhex, hashes))
            good, miss, media = self._load(keys, places, time.monotonic() + self._options.load_timeout_s)
            reason = miss.value if miss else ""
            if self._leads and good == len(hashes) and media == {Medium.HOST}:
                self._link.report_load(good * self._bytes, time.perf_counter() - started)
        except Exception as error:
            reason = self._reason(error)
        if good:
            self._recorder.loaded(good, good * self._bytes, time.perf_counter() - started)
            self._recorder.count("bytes_loaded", self._name, good * self._bytes)
        self._recorder.count("pages_missed", reason, len(hashes) - good)
        return [index < good for index in range(len(hashes))]

    def save(self, hashes: Sequence[str], host_indices: torch.Tensor, before: Sequence[str]) -> list[bool]:
        """Store pages that the node lacks; True for those that it holds, whoever stored them."""
        if self._binding.part is None:
            return [True] * len(hashes)
        started = time.perf_counter()
        deadline = time.monotonic() + self._options.save_timeout_s
        held = [False] * len(hashes)
        written, reason = 0, None
        try:
            places = self._binding.pages.places(host_indices, len(hashes))
            blocks = self._blocks(hashes, before)
            for at in range(0, len(blocks), self._chunk):
                part = slice(at, at + self._chunk)
                held[part], copied, reason = self._save(blocks[part], places[part], deadline)
                written += copied
                if reason:
                    break
        except Exception as error:
            reason = self._reason(error)
        if written:
            self._recorder.saved(written, written * self._bytes, time.perf_counter() - started)
            self._recorder.count("bytes_saved", self._name, written * self._bytes)
        if reason:
            self._recorder.count("pages_not_saved", reason, held.count(False))
        return held

    def clear(self, timeout: float) -> None:
        """Delete every block of the namespace, from every tier of the node. Raises KVStoreError."""
        fields = self._binding.namespace.to_dict()
        digest, _ = self._client.call("open_namespace", timeout, fields=fields, block_bytes=self._bytes)
        self._client.call("delete", timeout, namespace=digest)

    def close(self) -> None:
        """Let the node go. What is under way ends by its own deadline."""
        self._acquires.shutdown(wait=True)
        if self._straight is not None:
            self._straight.close()
        self._link.close()

    def _load(
        self, keys: list[BlockKey], places: Sequence[Place], deadline: float
    ) -> tuple[int, Miss | None, set[Medium]]:
        """How many blocks came, why no more did, and from which tiers."""
        if self._straight is None:
            return self._copy(keys, places, deadline)
        located = self._straight.locate(keys, list(map(self._binding.pages.pieces, places)), deadline)
        good, media = 0, set[Medium]()
        for reads in (list(run) for _, run in groupby(located, key=bool)):
            end = good + len(reads)
            if came := self._straight.read([read for read in reads if read is not None], deadline):
                good += came
                media.add(Medium.DISK)
            if good < end and time.monotonic() >= deadline:
                return good, Miss.DEADLINE, media
            if good < end:
                came, miss, tiers = self._copy(keys[good:end], places[good:end], deadline)
                good += came
                media |= tiers
                if miss is not None:
                    return good, miss, media
        return good, None, media

    def _copy(
        self, keys: list[BlockKey], places: Sequence[Place], deadline: float
    ) -> tuple[int, Miss | None, set[Medium]]:
        """The same through the arena. Copies a chunk while the node brings the next ones."""
        chunks = iter([keys[at : at + self._chunk] for at in range(0, len(keys), self._chunk)])
        ahead = deque((chunk, self._begin_acquire(chunk, deadline)) for chunk in islice(chunks, AHEAD))
        good = 0
        media: set[Medium] = set()
        try:
            while ahead:
                chunk, acquiring = ahead.popleft()
                acquired = acquiring.result()
                complete = len(acquired.offsets) == len(chunk)
                if complete:
                    ahead.extend((more, self._begin_acquire(more, deadline)) for more in islice(chunks, 1))
                try:
                    for offset, place in zip(acquired.offsets, places[good:], strict=False):
                        self._binding.pages.load(place, acquired.arena.slot(offset, self._bytes))
                finally:
                    self._client.release(chunk[: len(acquired.offsets)])
                good += len(acquired.offsets)
                media.update(acquired.media)
                if not complete:
                    return good, acquired.miss or Miss.NOT_STORED, media
        finally:
            for chunk, acquiring in ahead:  # not wanted any more: give back what they get
                acquiring.add_done_callback(partial(self._release_late, chunk))
        return good, None, media

    def _begin_acquire(self, keys: Sequence[BlockKey], deadline: float) -> Future[Acquired]:
        return self._acquires.submit(self._acquire, keys, deadline)

    def _acquire(self, keys: Sequence[BlockKey], deadline: float) -> Acquired:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"loading took longer than {self._options.load_timeout_s} s")
        return self._client.acquire(keys, left)

    def _release_late(self, keys: Sequence[BlockKey], late: Future[Acquired]) -> None:
        with suppress(KVStoreError):
            self._client.release(keys[: len(late.result().offsets)])

    def _blocks(self, hashes: Sequence[str], before: Sequence[str]) -> list[NewBlock]:
        keys = self._keyring().block_keys(map(bytes.fromhex, (*before[-1:], *hashes)))
        if not before:
            keys = [NO_PARENT, *keys]
        return [NewBlock(key, keys[at], len(before) + at) for at, key in enumerate(keys[1:])]

    def _save(
        self, blocks: Sequence[NewBlock], places: Sequence[Place], deadline: float
    ) -> tuple[list[bool], int, str | None]:
        """Store a chunk: which blocks the node holds now, how many of them we wrote, and why it refused one."""
        binding = self._binding
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"saving took longer than {self._options.save_timeout_s} s")
        reserved = self._client.reserve(binding.namespace, blocks, binding.part or 0, binding.parts, left)
        wanted = [(at, offset) for at, offset in enumerate(reserved.offsets) if offset is not None]
        keys = [blocks[at].key for at, _ in wanted]
        try:
            for at, offset in wanted:
                binding.pages.save(places[at], reserved.arena.slot(offset, self._bytes))
        except BaseException:
            self._client.abort(keys)
            raise
        if keys:
            self._client.commit(keys, binding.part or 0, timeout=max(deadline - time.monotonic(), 0.001))
        refused = {at: miss for at, miss in reserved.misses.items() if miss is not Miss.PRESENT}
        reason = next((miss.value for miss in refused.values()), None)
        return [at not in refused for at in range(len(blocks))], len(wanted), reason

    def _asked(self, ask: Callable[[Keyring], T], nothing: T, pages: int) -> T:
        try:
            return ask(self._keyring())
        except Exception as error:
            self._recorder.count("pages_missed", self._reason(error), pages)
            return nothing

    def _keyring(self) -> Keyring:
        if self._link.keyring is None:
            raise _NoNode
        return self._link.keyring

    def _prepare(self) -> None:
        """Map a new node's arena before it is needed."""
        arena = self._client.acquire([], 5.0).arena
        threading.Thread(target=arena.populate, name="kvstore-populate", daemon=True).start()

    def _reason(self, error: Exception) -> str:
        """Why nothing was moved, as a label. What we did not foresee is logged with its origin."""
        if isinstance(error, DeadlineExceeded):
            return Miss.DEADLINE.value
        if isinstance(error, IdentityError):
            logger.warning("KV store, pool %s: %s", self._name, error)
            return "bad_call"
        if isinstance(error, KVStoreError):
            if not isinstance(error, _NoNode):
                self._link.lost()
            return Miss.UNAVAILABLE.value
        logger.exception("KV store, pool %s: moving pages failed", self._name, exc_info=error)
        return "error"


def leading(held: Sequence[bool]) -> int:
    """How many are True before the first that is not."""
    return next((at for at, there in enumerate(held) if not there), len(held))


class _NoNode(KVStoreError):
    """No node is known to answer; the link has said so."""
