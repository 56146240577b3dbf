"""The pipeline over real tiers: host memory in front of a disk, and fakes where a tier must misbehave on cue."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import kvstore.reservations
from kvstore.envelope import HEADER_BYTES, Header, envelope_bytes
from kvstore.errors import BlockCorrupt, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.leases import Session
from kvstore.node.api import Miss, NewBlock
from kvstore.node.arena import Arena
from kvstore.policy.admission import AdmissionPolicy, Mode, Thresholds
from kvstore.policy.reuse import Traffic
from kvstore.store import Flags, Store, consecutive, contained, runs_of
from kvstore.telemetry import StoreMetrics
from kvstore.testing.blocks import NAMESPACE, SealedBlock, random_chain
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats
from kvstore.tiers.host import HostTier

LENGTH = 50_000
SLOT = envelope_bytes(LENGTH)
MIB = 1 << 20


class MemoryTier(Tier):
    """A tier in a dict, which a test can slow down or break."""

    def __init__(self, medium: Medium = Medium.DISK) -> None:
        self.medium = medium
        self.blocks: dict[BlockKey, SealedBlock] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.gets = 0
        self.touched: list[BlockKey] = []

    def keys(self):  # type: ignore[no-untyped-def]
        return self.blocks.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        block = self.blocks.get(key)
        return BlockStat(key=key, length=block.header.length) if block else None

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self.touched.extend(keys)

    def stats(self) -> TierStats:
        return TierStats(self.medium, len(self.blocks), 0, None)

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        await self.gate.wait()
        if self.failure:
            raise self.failure
        self.blocks[header.key] = SealedBlock(header, memoryview(bytes(envelope)))
        return PutResult.STORED

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        self.gets += 1
        block = self.blocks.get(key)
        await self.gate.wait()
        if self.failure:
            raise self.failure
        assert block is not None
        into[: len(block.envelope)] = block.envelope
        return block.header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        return sum(self.blocks.pop(key, None) is not None for key in keys)

    async def close(self) -> None:
        pass


class Rig:
    """A store with 16 slots of host memory, over two tiers in memory unless told otherwise."""

    def __init__(self, lower: list[Tier] | None = None, queue_bytes: int = 8 * SLOT) -> None:
        extent = 16 * SLOT
        self.host = HostTier(Arena.create(extent, epoch=1), extent)
        self.disk = MemoryTier(Medium.DISK)
        self.bucket = MemoryTier(Medium.OBJECT)
        self.probed: list[BlockKey] = []
        self.store = Store(self.host, lower or [self.disk, self.bucket], StoreMetrics(), queue_bytes, probe=self._probe)
        self.session = Session()

    async def _probe(self, keys: Iterable[BlockKey]) -> None:
        self.probed.extend(keys)

    def reserve(self, chain: list[SealedBlock], session: Session | None = None) -> list[int | Miss]:
        blocks = [NewBlock(b.key, b.header.parent, b.header.index) for b in chain]
        return self.store.reserve(session or self.session, NAMESPACE, LENGTH, 64, blocks)

    async def save(self, chain: list[SealedBlock], durable: Medium = Medium.HOST) -> list[BlockKey]:
        granted = []
        for block, answer in zip(chain, self.reserve(chain), strict=True):
            if not isinstance(answer, Miss):
                self.host.arena.buffer[answer : answer + LENGTH] = block.payload
                granted.append(block.key)
        return await self.store.commit(self.session, granted, durable=durable)

    def payloads(self, offsets: list[int]) -> list[bytes]:
        return [bytes(self.host.arena.buffer[offset : offset + LENGTH]) for offset in offsets]

    def counted(self, name: str) -> float:
        return self.store.metrics.snapshot().get(f"kvstore_{name}", 0.0)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    for tier in (rig.disk, rig.bucket):
        tier.gate.set()
    await rig.store.close()


@pytest.fixture
def chain() -> list[SealedBlock]:
    return random_chain(random.Random(1), 6, LENGTH)


def keys_of(chain: list[SealedBlock]) -> list[BlockKey]:
    return [block.key for block in chain]


async def test_a_saved_chain_is_written_to_every_tier(rig: Rig, chain: list[SealedBlock]) -> None:
    assert await rig.save(chain) == keys_of(chain)
    assert await rig.store.drain(5)
    for tier in (rig.disk, rig.bucket):
        assert {key: block.payload for key, block in tier.blocks.items()} == {b.key: b.payload for b in chain}
        assert tier.blocks[chain[2].key].header.parent == chain[1].key


async def test_commit_waits_for_the_durability_asked_for(rig: Rig, chain: list[SealedBlock]) -> None:
    assert await rig.save(chain[:2], durable=Medium.OBJECT) == keys_of(chain[:2])
    assert set(rig.bucket.blocks) == set(keys_of(chain[:2]))
    rig.bucket.failure = TierUnavailable("away")
    assert await rig.save(chain[2:4], durable=Medium.OBJECT) == []
    assert await rig.save(chain[4:], durable=Medium.DISK) == keys_of(chain[4:])


async def test_the_longest_prefix_is_found_across_tiers(rig: Rig, chain: list[SealedBlock]) -> None:
    for block in chain[:2]:
        await rig.host.put(block.header, block.envelope)
    for block in chain[1:4]:
        await rig.disk.put(block.header, block.envelope)
    await rig.bucket.put(chain[5].header, chain[5].envelope)
    found = rig.store.lookup(keys_of(chain))
    assert (found.blocks, found.runs) == (4, ((Medium.HOST, 2), (Medium.DISK, 2)))
    assert rig.store.lookup(keys_of(chain), start=3).runs == ((Medium.DISK, 1),)
    assert rig.store.lookup(keys_of(chain), start=4).blocks == 0
    await asyncio.sleep(0.01)
    assert rig.probed[:2] == keys_of(chain[4:])
    assert rig.disk.touched[:4] == keys_of(chain[:4])


async def test_blocks_are_brought_to_the_arena_from_the_fastest_tier(rig: Rig, chain: list[SealedBlock]) -> None:
    for block in chain:
        await rig.bucket.put(block.header, block.envelope)
    await rig.disk.put(chain[1].header, chain[1].envelope)
    delivery = await rig.store.acquire(rig.session, keys_of(chain), 5)
    assert rig.payloads(delivery.offsets) == [block.payload for block in chain]
    assert delivery.media == [Medium.DISK if i == 1 else Medium.OBJECT for i in range(6)]
    assert delivery.miss is None
    await rig.store.drain(5)
    assert set(rig.disk.blocks) == set(keys_of(chain)), "what came from the bucket gets to the disk"


async def test_a_block_wanted_twice_is_fetched_once(rig: Rig, chain: list[SealedBlock]) -> None:
    await rig.disk.put(chain[0].header, chain[0].envelope)
    rig.disk.gate.clear()
    sessions = [Session() for _ in range(5)]
    waiting = [asyncio.create_task(rig.store.acquire(s, [chain[0].key], 5)) for s in sessions]
    await asyncio.sleep(0.01)
    rig.disk.gate.set()
    assert [len((await task).offsets) for task in waiting] == [1] * 5
    assert rig.disk.gets == 1


async def test_at_the_deadline_a_prefix_is_the_answer_and_the_rest_still_arrives(
    rig: Rig, chain: list[SealedBlock]
) -> None:
    for block in chain[:2]:
        await rig.host.put(block.header, block.envelope)
    for block in chain[2:]:
        await rig.disk.put(block.header, block.envelope)
    rig.disk.gate.clear()
    delivery = await rig.store.acquire(rig.session, keys_of(chain), 0.05)
    assert (len(delivery.offsets), delivery.miss) == (2, Miss.DEADLINE)
    rig.disk.gate.set()
    while len(rig.host.keys()) < 6:
        await asyncio.sleep(0.01)
    rig.store.end(rig.session)
    assert not rig.host.index.pins[rig.host.index.used()].any(), "a late block stayed leased"


async def test_a_block_that_is_overdue_is_known_before_it_comes(rig: Rig, chain: list[SealedBlock]) -> None:
    for block in chain:
        await rig.disk.put(block.header, block.envelope)
    meter = rig.store.promoter.meters[Medium.DISK]
    await rig.store.acquire(rig.session, keys_of(chain[:2]), 5)
    assert meter.known
    rig.disk.gate.clear()
    fetching = asyncio.create_task(rig.store.acquire(rig.session, keys_of(chain[2:]), 30))
    async with asyncio.timeout(30):
        while (speed := meter.speed(0, time.monotonic())).queued_bytes / speed.bandwidth < 0.1:
            await asyncio.sleep(0.01)
    rig.disk.gate.set()
    assert len((await fetching).offsets) == 4
    speed = meter.speed(0, time.monotonic() + 60)
    assert speed.queued_bytes / speed.bandwidth < 60, "nothing is under way any more"


async def test_a_tier_that_nobody_measured_is_known_when_what_was_late_has_come(
    rig: Rig, chain: list[SealedBlock]
) -> None:
    for block in chain:
        await rig.disk.put(block.header, block.envelope)
    meter = rig.store.promoter.meters[Medium.DISK]
    rig.disk.gate.clear()
    assert (await rig.store.acquire(rig.session, keys_of(chain), 0.02)).miss is Miss.DEADLINE
    assert not meter.known, "all that is known is that it takes longer"
    await asyncio.sleep(0.2)
    rig.disk.gate.set()
    async with asyncio.timeout(30):
        while not meter.known:
            await asyncio.sleep(0.01)
    speed = meter.speed()
    assert speed.latency + SLOT / speed.bandwidth > 0.1


@pytest.mark.parametrize(
    ("failure", "miss"), [(BlockCorrupt("bit"), Miss.CORRUPT), (TierUnavailable("away"), Miss.UNAVAILABLE)]
)
async def test_a_tier_that_fails_is_passed_over(
    rig: Rig, chain: list[SealedBlock], failure: Exception, miss: Miss
) -> None:
    await rig.disk.put(chain[0].header, chain[0].envelope)
    rig.disk.failure = failure
    delivery = await rig.store.acquire(rig.session, [chain[0].key], 5)
    assert (delivery.offsets, delivery.miss) == ([], miss)
    await rig.bucket.put(chain[0].header, chain[0].envelope)
    delivery = await rig.store.acquire(rig.session, [chain[0].key], 5)
    assert delivery.media == [Medium.OBJECT]
    assert rig.host.stats().used_bytes == SLOT, "a slot leaked"


async def test_a_missing_block_ends_the_prefix(rig: Rig, chain: list[SealedBlock]) -> None:
    for block in (chain[0], chain[2]):
        await rig.disk.put(block.header, block.envelope)
    delivery = await rig.store.acquire(rig.session, keys_of(chain[:3]), 5)
    assert (len(delivery.offsets), delivery.miss) == (1, Miss.NOT_STORED)
    assert rig.counted("missed_blocks_total{reason=not_stored}") == 2


async def test_a_full_queue_drops_and_counts(chain: list[SealedBlock]) -> None:
    rig = Rig(queue_bytes=2 * SLOT)
    rig.disk.gate.clear()
    assert await rig.save(chain) == keys_of(chain), "saving waited for the disk"
    assert rig.counted("dropped_blocks_total{tier=disk}") == 4
    assert rig.store.queued_bytes[Medium.DISK] <= 2 * SLOT
    rig.disk.gate.set()
    await rig.store.drain(5)
    assert set(rig.disk.blocks) == set(keys_of(chain[:2]))
    await rig.store.acquire(rig.session, keys_of(chain), 5)
    await rig.store.drain(5)
    await rig.store.acquire(rig.session, keys_of(chain), 5)
    await rig.store.drain(5)
    assert set(rig.disk.blocks) == set(keys_of(chain)), "what was dropped is written when it is used again"
    await rig.store.close()


async def test_an_outage_does_not_keep_blocks_from_a_tier_for_ever(rig: Rig, chain: list[SealedBlock]) -> None:
    rig.bucket.failure = TierUnavailable("away")
    await rig.save(chain)
    await rig.store.drain(5)
    assert not rig.bucket.blocks
    assert rig.counted("written_blocks_total{outcome=failed,tier=object}") == 6
    rig.bucket.failure = None
    await rig.store.acquire(rig.session, keys_of(chain), 5)
    await rig.store.drain(5)
    assert set(rig.bucket.blocks) == set(keys_of(chain))


async def test_a_session_that_ends_gives_everything_back(rig: Rig, chain: list[SealedBlock]) -> None:
    await rig.save(chain[:3])
    await rig.store.drain(5)
    await rig.store.acquire(rig.session, keys_of(chain[:3]), 5)
    await rig.store.acquire(rig.session, keys_of(chain[:2]), 5)
    rig.reserve(chain[3:])
    rig.store.end(rig.session)
    assert not rig.host.index.pins[rig.host.index.used()].any()
    assert rig.host.stats().used_bytes == 3 * SLOT
    assert all(isinstance(answer, int) for answer in rig.reserve(chain[3:]))


async def test_a_slot_stays_reserved_while_another_part_may_be_written(rig: Rig, chain: list[SealedBlock]) -> None:
    first, second = Session(), Session()
    block = [NewBlock(chain[0].key, NO_PARENT, 0)]
    assert rig.store.reserve(first, NAMESPACE, LENGTH, 64, block, 0, 2) == [HEADER_BYTES]
    assert rig.store.reserve(second, NAMESPACE, LENGTH, 64, block, 1, 2) == [HEADER_BYTES]
    rig.store.end(first)
    assert rig.host.stats().used_bytes == SLOT
    assert await rig.store.commit(second, [chain[0].key], part=1) == []
    assert rig.host.stats().used_bytes == 0
    assert chain[0].key not in rig.host.keys()


async def test_deleting_a_leased_block_waits_for_its_reader(rig: Rig, chain: list[SealedBlock]) -> None:
    await rig.save(chain[:1])
    await rig.store.drain(5)
    delivery = await rig.store.acquire(rig.session, [chain[0].key], 5)
    await rig.store.delete([chain[0].key])
    assert rig.store.lookup([chain[0].key]).blocks == 0
    assert rig.payloads(delivery.offsets) == [chain[0].payload]
    rig.store.release(rig.session, [chain[0].key])
    assert rig.host.stats().used_bytes == 0


async def test_a_deleted_block_does_not_come_back_from_a_write_or_a_fetch_that_was_under_way(
    rig: Rig, chain: list[SealedBlock]
) -> None:
    rig.disk.gate.clear()
    await rig.save(chain)
    await asyncio.sleep(0)  # the disk is writing the first blocks, and the others wait
    deleting = asyncio.create_task(rig.store.delete(keys_of(chain)))
    await asyncio.sleep(0.01)
    rig.disk.gate.set()
    await deleting
    await rig.store.drain(5)
    assert rig.store.lookup(keys_of(chain)).blocks == 0
    assert not rig.disk.blocks
    assert not rig.bucket.blocks

    rig.disk.blocks = {block.key: block for block in chain}
    rig.disk.gate.clear()
    fetching = asyncio.create_task(rig.store.acquire(rig.session, keys_of(chain), 5))
    await asyncio.sleep(0.01)
    deleting = asyncio.create_task(rig.store.delete(keys_of(chain)))
    await asyncio.sleep(0.01)
    rig.disk.gate.set()
    await deleting
    await fetching
    await rig.store.drain(5)
    assert rig.store.lookup(keys_of(chain)).blocks == 0


async def test_releasing_what_was_never_leased_does_no_harm(rig: Rig, chain: list[SealedBlock]) -> None:
    await rig.save(chain[:1])
    rig.store.release(rig.session, keys_of(chain))
    rig.store.abort(rig.session, keys_of(chain))
    assert rig.store.lookup([chain[0].key]).blocks == 1


async def test_host_memory_over_a_real_disk(tmp_path: Path, chain: list[SealedBlock]) -> None:
    from kvstore.tiers.disk import DiskTier

    for expected in (Medium.HOST, Medium.DISK):
        rig = Rig([await DiskTier.open(tmp_path, 64 * MIB, segment_bytes=16 * MIB)])
        if expected is Medium.HOST:
            assert await rig.save(chain, durable=Medium.DISK) == keys_of(chain)
        delivery = await rig.store.acquire(rig.session, keys_of(chain), 5)
        assert rig.payloads(delivery.offsets) == [block.payload for block in chain]
        assert set(delivery.media) == {expected}
        await rig.store.close()


def test_runs() -> None:
    keys = [BlockKey(bytes([i])) for i in range(6)]
    host, disk = set(keys[:1] + keys[3:4]), set(keys[:5])
    h, d = Medium.HOST, Medium.DISK

    def runs(keys: list[BlockKey]) -> list[tuple[Medium, int]]:
        return runs_of([(h, contained(keys, host)), (d, contained(keys, disk))], len(keys))

    assert runs(keys) == [(h, 1), (d, 2), (h, 1), (d, 1)]
    assert runs(keys[:1]) == [(h, 1)]
    assert runs(keys[5:]) == []
    assert runs([]) == []
    assert runs_of([], len(keys)) == []


def test_what_the_fastest_tier_holds_is_not_looked_for_elsewhere() -> None:
    keys = [BlockKey(bytes([i])) for i in range(6)]
    asked = []

    def tiers() -> Iterator[tuple[Medium, Flags]]:
        for medium in (Medium.HOST, Medium.DISK):
            asked.append(medium)
            yield medium, contained(keys, set(keys))

    assert runs_of(tiers(), len(keys)) == [(Medium.HOST, 6)]
    assert asked == [Medium.HOST]


async def test_admission_keeps_one_off_blocks_from_the_bucket_until_they_are_asked_for_again(
    chain: list[SealedBlock],
) -> None:
    rig = Rig()
    traffic = Traffic()
    rig.store = Store(
        rig.host,
        [rig.disk, rig.bucket],
        StoreMetrics(),
        8 * SLOT,
        admission=AdmissionPolicy(traffic, mode=Mode.ENFORCE),
    )
    traffic.observe(keys_of(chain), 1.0)
    await rig.save(chain)
    await rig.store.drain(5)
    assert not rig.bucket.blocks
    assert rig.counted("judged_blocks_total{reason=seen_once,tier=object}") == 6
    traffic.observe(keys_of(chain), 2.0)
    await rig.store.acquire(rig.session, keys_of(chain), 5)
    await rig.store.drain(5)
    assert set(rig.bucket.blocks) == set(keys_of(chain))
    await rig.store.close()


class Enforcing(Rig):
    """A rig whose disk takes what admission admits."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic(1 << 8)
        admission = AdmissionPolicy(self.traffic, mode=Mode.ENFORCE)
        self.store = Store(self.host, [self.disk], StoreMetrics(), 16 * SLOT, admission=admission)

    async def ask(self, chain: list[SealedBlock], durable: Medium = Medium.HOST) -> list[BlockKey]:
        self.traffic.observe(keys_of(chain), time.time())
        return await self.save(chain, durable)

    async def settle(self) -> None:
        async with asyncio.timeout(30):
            while self.store.queued_bytes[Medium.DISK]:
                await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def enforcing() -> AsyncIterator[Enforcing]:
    rig = Enforcing()
    yield rig
    await rig.store.close()


async def test_the_disk_is_asked_when_memory_gives_a_block_up(enforcing: Enforcing, chain: list[SealedBlock]) -> None:
    await enforcing.ask(chain)
    await enforcing.settle()
    assert not enforcing.disk.blocks, "it may be asked for again while it is in memory"
    source = random.Random(2)
    for _ in range(4):
        await enforcing.ask(random_chain(source, 4, LENGTH))
        await enforcing.settle()
    assert not set(keys_of(chain)) <= enforcing.host.keys()
    assert set(keys_of(chain)) <= enforcing.host.keys() | enforcing.disk.keys(), "nothing is known against them"
    assert (await enforcing.store.acquire(enforcing.session, keys_of(chain), 5)).miss is None


async def test_what_is_refused_is_not_written_when_it_leaves(
    enforcing: Enforcing,
) -> None:
    enforcing.store.admission = AdmissionPolicy(
        enforcing.traffic, mode=Mode.ENFORCE, thresholds=Thresholds(disk_pressure=0.0)
    )
    source = random.Random(2)
    for _ in range(6):
        await enforcing.ask(random_chain(source, 4, LENGTH))
        await enforcing.settle()
    assert enforcing.host.stats().evicted
    assert not enforcing.disk.blocks
    judged = enforcing.store.metrics.snapshot()["kvstore_judged_blocks_total{reason=under_pressure,tier=disk}"]
    assert 0 < judged <= 24, "each was asked about once"


async def test_what_is_asked_for_again_is_written_at_once(enforcing: Enforcing, chain: list[SealedBlock]) -> None:
    enforcing.traffic.observe(keys_of(chain)[:3], time.time())
    await enforcing.ask(chain)
    await enforcing.settle()
    assert set(enforcing.disk.blocks) == set(keys_of(chain)[:3])


async def test_durability_that_is_asked_for_does_not_wait(enforcing: Enforcing, chain: list[SealedBlock]) -> None:
    assert await enforcing.ask(chain, durable=Medium.DISK) == keys_of(chain)
    assert set(enforcing.disk.blocks) == set(keys_of(chain))


async def test_a_node_that_stops_writes_down_what_its_disk_admits(
    enforcing: Enforcing, chain: list[SealedBlock]
) -> None:
    source = random.Random(2)
    chains = [chain, random_chain(source, 4, LENGTH), random_chain(source, 4, LENGTH)]
    for each in chains:
        await enforcing.ask(each)
    assert await enforcing.store.drain(30)
    assert set(enforcing.disk.blocks) == {key for each in chains for key in keys_of(each)}


async def test_a_block_whose_ancestors_are_lost_is_not_written(enforcing: Enforcing, chain: list[SealedBlock]) -> None:
    await enforcing.ask(chain)
    await enforcing.host.delete([chain[2].key])
    assert await enforcing.store.drain(30)
    assert set(enforcing.disk.blocks) == set(keys_of(chain)[:2])


def test_consecutive_blocks_are_taken_together() -> None:
    source = random.Random(1)
    one, two = ([block.header for block in random_chain(source, 3, 10)] for _ in range(2))
    assert list(consecutive([*one, *two[1:]])) == [one, two[1:]]
    assert list(consecutive([one[0], one[2]])) == [[one[0]], [one[2]]]
    assert list(consecutive([])) == []


async def test_a_part_that_nobody_comes_for_does_not_hold_its_slot_for_ever(
    rig: Rig, chain: list[SealedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.reservations, "UNCLAIMED_SECONDS", 0.05)
    block = [NewBlock(chain[0].key, NO_PARENT, 0)]
    rig.store.reserve(rig.session, NAMESPACE, LENGTH, 64, block, part=0, parts=2)
    assert await rig.store.commit(rig.session, [chain[0].key], part=0) == []
    assert rig.host.stats().used_bytes == SLOT
    while rig.host.stats().used_bytes:
        await asyncio.sleep(0.01)
    assert isinstance(rig.store.reserve(rig.session, NAMESPACE, LENGTH, 64, block, part=1, parts=2)[0], int)
