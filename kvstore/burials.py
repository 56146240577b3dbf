"""Keeps a node clear of what was deleted for good in its region.

The bucket's tombstones are read at the start and every ``POLL_SECONDS``. What they bury goes from memory and disk; a dead
block that turns up later, from a write or a fetch that was under way, is neither stored nor served. The bucket itself is
cleared by whoever wrote the tombstone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from kvstore.envelope import Header
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, IdentityError, TierError
from kvstore.files import replace_file
from kvstore.history import What
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.namespaces import NamespaceBook
from kvstore.parsing import parse_json
from kvstore.store import Store
from kvstore.tiers.base import BlockStat, Medium, PutResult, Slot, Tier
from kvstore.tiers.object.names import TOMBSTONES, receipt_name
from kvstore.tiers.object.objects import Objects
from kvstore.tiers.wrappers import Wrapped
from kvstore.tombstones import Graves, Labelled, Tombstone, buried

log = structlog.get_logger(__name__)

POLL_SECONDS = 15.0
"""One listing of a few names. Where a catalog tells of something new (``kvstore.catalog.purges``), nodes look at once."""
MAX_TOMBSTONES = 10_000
MAX_TOMBSTONE_BYTES = 8 << 10
JUDGED_AT_ONCE = 500
"""Blocks between two pauses of a sweep: some 2 ms of the event loop that engines wait for."""


class Buried(Wrapped):
    """Stores and delivers no block that is buried; one that is met is deleted."""

    def __init__(self, inner: Tier, graves: Graves) -> None:
        super().__init__(inner)
        self._graves = graves

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        if self._graves.dead(header):
            return PutResult.REFUSED
        result = await self.inner.put(header, envelope)
        if self._graves.dead(header):  # buried while it was written
            await self.inner.delete([header.key])
            return PutResult.REFUSED
        return result

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        header = await self.inner.get(key, into)
        if self._graves.dead(header):
            await self.inner.delete([key])
            raise BlockNotFound(f"{key.hex()} was deleted for good")
        return header

    def locate(self, key: BlockKey) -> Slot | None:
        """Not of what may be buried: an index does not know when a block was computed."""
        if (stat := self.inner.stat(key)) is None or self._graves.dead(_Resting.of(stat, created=0.0)):
            return None
        return self.inner.locate(key)


class Undertaker:
    """Follows the bucket's tombstones and sweeps the node's own tiers. Owned by the node's event loop."""

    def __init__(self, namespaces: NamespaceBook, file: Path, node: str) -> None:
        """``file`` keeps the tombstones that this node has carried out; ``node`` is its name in the region."""
        self.others: Callable[[], Iterable[Store]] = tuple
        """Stores of this node to sweep beside the one that is watched."""
        self._node = node
        self._unconfirmed: dict[str, bytes] = {}
        """Receipts that the bucket lacks, by name."""
        self._namespaces = namespaces
        self._file = file
        self.graves = Graves(self._label, _read(file))
        self._known = {stone.identity for stone in self.graves}
        self._unswept: list[Tombstone] = []
        self._watching: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()

    def over(self, tier: Tier) -> Tier:
        """The tier without what is buried."""
        return Buried(tier, self.graves)

    def attend(self, bucket: Tier) -> Tier:
        """The same, of the tier over which the tombstones are read: to close it ends that."""
        return _Attended(self.over(bucket), self)

    def watch(self, store: Store, objects: Objects) -> None:
        """Begin. ``objects`` are the bucket's."""
        self._watching = asyncio.create_task(self._watch(store, objects))

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    def wake(self) -> None:
        """Look now: somebody says that there is something new."""
        self._woken.set()

    async def look(self, store: Store, objects: Objects) -> None:
        """Carry out what is new. Raises TierError; what could not be carried out is tried again the next time."""
        new = await read_tombstones(objects, self._known)
        self._known |= new.keys()
        self.graves.add(new.values())
        self._unswept += new.values()
        if not self._unswept:
            await self._confirm(objects)
            return
        swept = sum([await self._sweep(each, self._unswept) for each in (store, *self.others())])
        for stone in self._unswept:
            receipt = {"node": self._node, "time": time.time(), "blocks": swept}
            self._unconfirmed[receipt_name(stone.identity, self._node)] = json.dumps(receipt).encode()
        self._unswept = []
        log.info("carried out tombstones", new=len(new), blocks=swept)
        try:
            await asyncio.to_thread(_write, self._file, list(self.graves))
        except OSError as error:  # they are carried out once more after the next start
            log.warning("tombstones not kept", file=str(self._file), error=str(error))
        await self._confirm(objects)

    async def _confirm(self, objects: Objects) -> None:
        """Tell the region what this node has carried out."""
        for name, receipt in list(self._unconfirmed.items()):
            await objects.put(name, receipt, create=False)
            del self._unconfirmed[name]

    async def _watch(self, store: Store, objects: Objects) -> None:
        while True:
            try:
                await self.look(store, objects)
            except TierError as error:
                log.warning("tombstones not followed", error=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), POLL_SECONDS)
            self._woken.clear()

    async def _sweep(self, store: Store, stones: Sequence[Tombstone]) -> int:
        """Delete what new tombstones bury in memory and on disk; how many blocks.

        Memory knows when its blocks were created. The disk's index does not: there everything that is meant counts as
        older, which costs at most what was computed anew before the tombstone was seen.
        """
        labels = {known.digest: known.fields for known in self._namespaces}
        own = [tier for tier in store.tiers if tier.medium in (Medium.HOST, Medium.DISK)]
        dead: set[BlockKey] = set()
        for tier in own:
            found: list[_Resting] = []
            keys = list(tier.keys())
            for start in range(0, len(keys), JUDGED_AT_ONCE):
                for key in keys[start : start + JUDGED_AT_ONCE]:
                    stat = tier.stat(key)
                    if stat is not None and any(s.covers(stat.namespace, labels.get(stat.namespace)) for s in stones):
                        found.append(_Resting.of(stat, _created(store, tier, key)))
                await asyncio.sleep(0)
            found.sort(key=lambda block: block.depth)
            dead |= buried(found, labels, stones)
        if dead:
            await store.delete(list(dead), [tier.medium for tier in own], What.BURIED)
        return len(dead)

    def _label(self, digest: bytes) -> Labelled | None:
        known = self._namespaces.get(digest)
        return None if known is None else known.fields


def _created(store: Store, tier: Tier, key: BlockKey) -> float:
    """When a block was computed; 0 when that cannot be told."""
    try:
        return store.host.created(key) if tier is store.host else 0.0
    except BlockCorrupt:
        return 0.0


class _Resting(NamedTuple):
    """What is known of a block in a tier."""

    key: BlockKey
    parent: BlockKey
    namespace: bytes
    created: float
    depth: int

    @classmethod
    def of(cls, stat: BlockStat, created: float) -> _Resting:
        return cls(stat.key, stat.parent or NO_PARENT, stat.namespace, created, stat.index)


class _Attended(Wrapped):
    """The bucket's tier with an undertaker, who stops before it closes."""

    def __init__(self, inner: Tier, undertaker: Undertaker) -> None:
        super().__init__(inner)
        self._undertaker = undertaker

    async def close(self) -> None:
        await self._undertaker.close()
        await self.inner.close()


async def read_tombstones(objects: Objects, known: Container[str]) -> dict[str, Tombstone]:
    """The bucket's tombstones that are not ``known``, by identity; what cannot be read is left out. Raises TierUnavailable."""
    found: dict[str, Tombstone] = {}
    async for page in objects.walk(TOMBSTONES):
        for one in page:
            identity = one.name.rpartition("/")[2].removesuffix(".json")
            if identity in known or len(found) >= MAX_TOMBSTONES:
                continue
            try:
                into = memoryview(bytearray(min(one.size, MAX_TOMBSTONE_BYTES)))
                stone = await objects.get(one.name, into, lambda _, body: Tombstone.from_json(bytes(body)))
            except (IdentityError, BlockTooLarge) as error:
                log.warning("unreadable tombstone", name=one.name, error=str(error))
                continue
            if stone is not None:
                found[identity] = stone
    return found


def _read(file: Path) -> list[Tombstone]:
    try:
        texts = parse_json(file.read_text())
        return [Tombstone.from_json(text) for text in texts]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, IdentityError) as error:
        log.warning("tombstones are carried out anew", file=str(file), error=str(error))
        return []


def _write(file: Path, stones: Iterable[Tombstone]) -> None:
    replace_file(file, json.dumps([stone.to_json() for stone in stones]).encode())
