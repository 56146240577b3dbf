"""The object tier: blocks as objects of a bucket or files of a folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager

import structlog
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from kvstore.envelope import HEADER_BYTES, Header, verify
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, ConfigError, OtherFormat, TierUnavailable
from kvstore.identity import BlockKey, Namespace
from kvstore.index import BlockIndex
from kvstore.policy.eviction import LRU, EvictionPolicy
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats
from kvstore.tiers.object.bucket import Bucket
from kvstore.tiers.object.budget import ByteBudget
from kvstore.tiers.object.contents import Contents, plausible_size
from kvstore.tiers.object.documents import read_namespace, read_namespaces, write_hotness, write_namespace
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Found, Objects
from kvstore.tiers.object.peers import Peers
from kvstore.tiers.object.probe import ServerFeatures, probe
from kvstore.tiers.object.quarantine import BadBlock, BadObject, Quarantine
from kvstore.tiers.object.settings import ObjectSettings
from kvstore.tiers.object.survey import Survey

log = structlog.get_logger(__name__)

DELETED_AT_ONCE = 1000
"""A deletion of more goes in steps: what is left of it after a failure stays listed."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 30.0


class ObjectTier(Tier):
    """Blocks in a bucket or a folder; open it with ``ObjectTier.open``.

    What is in the bucket is learnt by a listing in the background: ``keys`` grows until ``ready`` is set. Blocks that other
    nodes add later are learnt by ``probe``, or from ``peers`` by ``learn``. A block in a folder outlives the process but not a
    power failure.
    """

    medium = Medium.OBJECT

    def __init__(
        self,
        objects: Objects,
        settings: ObjectSettings,
        policy: EvictionPolicy | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.settings = settings
        self.features: ServerFeatures | None = None
        """None until the server was reached."""
        self.ready = asyncio.Event()
        """Set once the whole bucket is listed."""
        self._objects = objects
        self._bucket = None if settings.folder else Bucket(settings)
        self._contents = Contents(policy or LRU(), settings.capacity_bytes, settings.max_blocks)
        self._quarantine = Quarantine(objects)
        self._peers = peers or Peers()
        self._survey = Survey(objects, self._contents, self._quarantine, self._peers)
        self._budget = ByteBudget(settings.bytes_in_flight)
        self._namespaces: dict[bytes, bool] = {}
        """Those that this process uses, and whether they have been written down."""
        self._admission = asyncio.Lock()
        self._writing: dict[BlockKey, asyncio.Event] = {}
        self._learning: asyncio.Task[None] | None = None
        self._evicted = self._refused = 0

    @classmethod
    async def open(
        cls, settings: ObjectSettings, policy: EvictionPolicy | None = None, peers: Peers | None = None
    ) -> ObjectTier:
        """Reach the bucket, see what its server does, and start to list it. ``peers`` are closed with the tier.

        When the server does not answer, the tier opens all the same and goes on trying. Raises ConfigError when it answers
        that this cannot work: wrong credentials, no such bucket.
        """
        tier = cls(await asyncio.to_thread(Objects.connect, settings), settings, policy, peers)
        tier._peers.join(tier)
        try:
            await tier._reach()
        except TierUnavailable as error:
            log.warning("object tier does not answer yet", url=settings.url, error=str(error))
        except BaseException:
            await tier.close()
            raise
        tier._learning = asyncio.create_task(tier._learn())
        return tier

    # --- the interface of every tier

    def keys(self) -> AbstractSet[BlockKey]:
        return self._contents.index.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        index = self._contents.index
        row = index.row(key)
        return None if row is None else index.stat(row)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self._contents.index.touch(keys, time.time())

    def stats(self) -> TierStats:
        return TierStats(
            medium=self.medium,
            blocks=len(self._contents.index),
            used_bytes=self._contents.used_bytes,
            capacity_bytes=self._contents.capacity,
            quarantined=self._quarantine.count,
            evicted=self._evicted,
            refused=self._refused,
        )

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        async with self._alone(header.key):
            await self._quarantine.settled(header.key)
            if header.key in self._contents.index:
                return PutResult.PRESENT
            return await self._put(header, envelope)

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        namespace = self._contents.namespace(key)
        if namespace is None:
            raise BlockNotFound(key.hex())
        name = block_name(namespace, key)

        def check(found: Found, envelope: memoryview) -> Header:
            try:
                header = verify(envelope, key)
            except OtherFormat:
                raise
            except BlockCorrupt as error:
                raise BadObject(str(error), found) from None
            if header.namespace != namespace:
                raise BadObject(f"header names namespace {header.namespace.hex()}", found)
            if found.size != header.envelope_bytes:
                raise BadObject(f"object has {found.size} bytes, its header says {header.envelope_bytes}", found)
            return header

        try:
            async with self._budget.taken(len(into)):
                header = await self._objects.get(name, into, check)
        except BadObject as bad:
            self._condemn(namespace, key, bad)
            raise BlockCorrupt(str(bad)) from bad
        except OtherFormat:  # nodes of another version share the bucket: theirs to read and to delete, here a miss
            self._contents.forget(key)
            raise BlockNotFound(key.hex()) from None
        except BlockTooLarge:
            await self._check_size(namespace, key)
            raise
        if header is None:
            self._survey.vanished(key)
            self._contents.forget(key)
            self._peers.lost(key)
            raise BlockNotFound(key.hex())
        self._correct(header)
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        waiting = list(keys)
        deleted = 0
        while waiting:
            now, waiting = waiting[:DELETED_AT_ONCE], waiting[DELETED_AT_ONCE:]
            known = [header for key in now if (header := self._contents.unlist(key)) is not None]
            if known:
                await self._delete(known)
            deleted += len(known)
        return deleted

    async def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait([self._learning])
        await self._peers.close()
        await self._quarantine.close()
        await self._objects.close()

    # --- what only this tier has

    @property
    def index(self) -> BlockIndex:
        """What is known of the bucket's blocks; to be read only."""
        return self._contents.index

    @property
    def bad_blocks(self) -> Sequence[BadBlock]:
        """The latest blocks that failed verification, oldest first."""
        return tuple(self._quarantine.last)

    @property
    def objects(self) -> Objects:
        """For whoever reads the bucket beside the tier; closed with it."""
        return self._objects

    async def probe(self, keys: Iterable[BlockKey]) -> int:
        """Ask the bucket for blocks that the index lacks, as other nodes may have stored them; how many were found.

        Looks in the namespaces given to ``put_namespace``. Bounded: a limited number of keys in one call, and a key that
        was not there is not asked for again for some seconds. Raises TierUnavailable.
        """
        return await self._survey.probe(keys, tuple(self._namespaces))

    def learn(self, blocks: Iterable[Header], wanted: bool = False) -> None:
        """List blocks that others know to be in the bucket, or correct what is known of them. No I/O.

        When the index is full, blocks make others forgotten only if they are ``wanted``: ranking all of it takes a while.
        """
        for header in blocks:
            if header.key in self._quarantine or self._contents.agrees(header):
                continue
            if self._contents.full and header.key not in self._contents.index:
                if not wanted:
                    continue
                self._forget_some()
            self._survey.appeared(header.key)
            self._contents.add(header, header.created)

    def unlearn(self, keys: Iterable[BlockKey]) -> None:
        """Unlist blocks that others know to be gone. No I/O."""
        for key in keys:
            self._survey.vanished(key)
            self._contents.forget(key)

    def learn_total(self, nbytes: int) -> None:
        """What others count in the bucket; of it, what is not listed here counts against the capacity too."""
        self._contents.unlisted_bytes = max(0, nbytes - self._contents.used_bytes)

    async def make_room(self, nbytes: int) -> int:
        """Delete the least valuable blocks until ``nbytes`` fit under the capacity; how many went. Raises TierUnavailable."""
        if self._contents.fits(nbytes):
            return 0
        if self.features and self.features.ranged_get:
            await self._survey.read_headers()
        async with self._admission:
            return await self._evict(self._contents.victims(nbytes), None)

    async def put_namespace(self, namespace: Namespace) -> None:
        """Write a namespace down, so that a listing can name its model. Raises TierUnavailable."""
        digest = namespace.digest
        if self._namespaces.get(digest):
            return
        self._namespaces[digest] = False
        await write_namespace(self._objects, namespace)
        self._namespaces[digest] = True

    async def put_hotness(self, node: str, snapshot: HotnessSnapshot) -> None:
        """Tell the region what this node's engines ask for most. Raises TierUnavailable."""
        await write_hotness(self._objects, node, snapshot)

    async def namespaces(self) -> dict[bytes, Namespace]:
        """Namespaces that were written down, by digest; unreadable ones are left out. Raises TierUnavailable."""
        return await read_namespaces(self._objects)

    async def namespace(self, digest: bytes) -> Namespace | None:
        """The namespace of this digest, if it was written down. Raises TierUnavailable."""
        return await read_namespace(self._objects, digest)

    # --- writing

    @asynccontextmanager
    async def _alone(self, key: BlockKey) -> AsyncIterator[None]:
        """One put of a key at a time: the second finds the block present, and need not send it."""
        while (other := self._writing.get(key)) is not None:
            await other.wait()
        done = self._writing[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._writing[key]
            done.set()

    async def _put(self, header: Header, envelope: memoryview) -> PutResult:
        async with self._room(header.envelope_bytes, header.key) as admitted:
            if not admitted:
                self._refused += 1
                return PutResult.REFUSED
            async with self._budget.taken(header.envelope_bytes):
                found = await self._store(header, envelope[: header.envelope_bytes])
        self._survey.appeared(header.key)
        if found is not None:
            self._peers.stored(self._contents.note(header.namespace, header.key, found))
            return PutResult.PRESENT
        self._quarantine.healed(header.key)
        self._contents.add(header, time.time())
        self._peers.stored(header)
        return PutResult.STORED

    async def _store(self, header: Header, envelope: memoryview) -> Found | None:
        """Write the object, or find the one that is there already."""
        name = block_name(header.namespace, header.key)
        overwrite = header.key in self._quarantine
        if not overwrite and not (self.features and self.features.conditional_put):
            found = await self._objects.head(name)
            if found is not None and plausible_size(found.size):
                return found
            overwrite = found is not None
        while not await self._objects.put(name, envelope, create=not overwrite):
            found = await self._objects.head(name)
            if found is not None and plausible_size(found.size):
                return found
            overwrite = True  # a stump, or gone again
        return None

    @asynccontextmanager
    async def _room(self, nbytes: int, newcomer: BlockKey) -> AsyncIterator[bool]:
        """Room for a block, counted as used until the end; False when there is none."""
        contents = self._contents
        if contents.capacity is not None:
            await self._listed()
        async with self._admission:
            if contents.full:
                await self._thin_out(newcomer)
            if not contents.fits(nbytes) and not self._peers.keep_room:
                await self._evict(contents.victims(nbytes), newcomer)
            admitted = contents.fits(nbytes)
            contents.used_bytes += nbytes * admitted
        try:
            yield admitted
        finally:
            contents.used_bytes -= nbytes * admitted

    async def _listed(self) -> None:
        """A capacity can only be kept once it is known what is there."""
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                await self.ready.wait()
        except TimeoutError:
            raise TierUnavailable("the bucket has not been listed yet") from None

    async def _thin_out(self, newcomer: BlockKey) -> None:
        """Make room in the index: blocks stay in the bucket if that has room for them, or others to keep it."""
        if self._contents.capacity is None or self._peers.keep_room:
            self._forget_some()
        else:
            await self._evict(self._contents.least_valuable(), newcomer)

    def _forget_some(self) -> None:
        """They stay in the bucket, merely unknown."""
        for key in self._contents.least_valuable():
            self._contents.forget(key)

    async def _evict(self, victims: Sequence[BlockKey], newcomer: BlockKey | None) -> int:
        evicted = await self.delete(victims)
        self._evicted += evicted
        if self.on_evict is not None:
            self.on_evict(self.medium, victims, newcomer)
        return evicted

    async def _delete(self, known: Sequence[Header]) -> None:
        """Delete the objects of blocks that were unlisted; list them again when that fails."""
        for header in known:
            self._survey.vanished(header.key)
        try:
            await self._peers.deleting([header.key for header in known])
            await self._objects.delete([block_name(header.namespace, header.key) for header in known])
        except TierUnavailable:
            for header in known:
                self._contents.add(header, 0.0)
                self._peers.stored(header)
            raise
        finally:
            self._contents.used_bytes -= sum(header.envelope_bytes for header in known)

    # --- bad blocks

    def _condemn(self, namespace: bytes, key: BlockKey, bad: BadObject) -> None:
        self._survey.vanished(key)
        if self._contents.forget(key) is not None:
            self._peers.lost(key)
            self._quarantine.add(namespace, key, bad.found.etag, str(bad))

    async def _check_size(self, namespace: bytes, key: BlockKey) -> None:
        """Raise BlockCorrupt if an object that was too large for its buffer is also larger than its header says."""
        if self.features is None or not self.features.ranged_get:
            return
        name = block_name(namespace, key)
        found, start = await self._objects.head(name), await self._objects.start_of(name, HEADER_BYTES)
        if found is None or start is None:
            return
        try:
            header = Header.unpack(start)
            if header.envelope_bytes == found.size:
                self._correct(header)  # the index was wrong, not the object
                return
            reason = f"object has {found.size} bytes, its header says {header.envelope_bytes}"
        except OtherFormat:
            self._contents.forget(key)
            raise BlockNotFound(key.hex()) from None
        except BlockCorrupt as error:
            reason = str(error)
        self._condemn(namespace, key, BadObject(reason, found))
        raise BlockCorrupt(reason)

    # --- learning what is there

    def _correct(self, header: Header) -> None:
        """Bring the index in line with a header that was read."""
        if header.key in self._contents.index and not self._contents.agrees(header):
            self._contents.add(header, time.time())
            self._peers.stored(header)

    async def _reach(self) -> None:
        if self._bucket is not None:
            await asyncio.to_thread(self._bucket.check)
        try:
            self.features = await probe(self._objects, self._bucket)
        except TierUnavailable as error:
            if isinstance(error.__cause__, (PermissionDeniedError, UnauthenticatedError)):
                remedy = "Give it the right to put, get and delete objects under the prefix."
                raise ConfigError("object.access_key_id", self.settings.access_key_id, str(error), remedy) from error
            raise
        if not self.features.conditional_put:
            log.warning("the server ignores conditional PUT: asking before each write", url=self.settings.url)

    async def _learn(self) -> None:
        """Reach the server if that has not happened, list the bucket; try again until it works."""
        delay = FIRST_RETRY_SECONDS
        while True:
            try:
                if self.features is None:
                    await self._reach()
                if not self.ready.is_set():
                    if not await self._peers.stock():
                        await self._survey.take_stock()
                    self.ready.set()
                if self._contents.capacity is not None and self.features and self.features.ranged_get:
                    await self._survey.read_headers()
                return
            except Exception as error:  # an outage, or settings that the server refuses only now
                log.warning("object tier: listing failed", error=str(error), retry_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, LAST_RETRY_SECONDS)
