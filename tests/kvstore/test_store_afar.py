"""A store that reads tiers which it never writes: other regions' blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable

import pytest
import pytest_asyncio
from test_store import MemoryTier, keys_of

from kvstore.envelope import Header, envelope_bytes
from kvstore.identity import BlockKey, Namespace
from kvstore.leases import Session
from kvstore.namespaces import KnownNamespace
from kvstore.node.api import Miss, NewBlock
from kvstore.node.arena import Arena
from kvstore.planning import Planning
from kvstore.policy.admission import AdmissionPolicy, Mode
from kvstore.policy.planner import Reason, Wait
from kvstore.policy.reuse import Traffic
from kvstore.promotion import BURST
from kvstore.store import Store
from kvstore.telemetry import StoreMetrics
from kvstore.testing.blocks import NAMESPACE, SealedBlock, random_chain
from kvstore.tiers.base import Medium, PutResult
from kvstore.tiers.host import HostTier

LENGTH = 4000
SLOT = envelope_bytes(LENGTH)
SLOTS = 8 * BURST
"""Of which a burst may take an eighth."""
MODEL = Namespace(
    model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="", block_tokens=64,
    layout="opaque:test",
)  # fmt: skip
KNOWN = KnownNamespace(MODEL, MODEL.digest, LENGTH)


class FarTier(MemoryTier):
    """Another region."""

    def __init__(self) -> None:
        super().__init__(Medium.REMOTE)
        self.asked: list[BlockKey] = []

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        self.asked.append(key)
        return await super().get(key, into)

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        raise AssertionError("nothing is written to another region")


class Rig:
    def __init__(self, observed: bool = False, admission: AdmissionPolicy | None = None) -> None:
        self.host = HostTier(Arena.create(SLOTS * SLOT, epoch=1), SLOTS * SLOT)
        self.disk, self.bucket, self.far = MemoryTier(Medium.DISK), MemoryTier(Medium.OBJECT), FarTier()
        self.probed: list[BlockKey] = []
        self.store = Store(
            self.host, [self.disk, self.bucket], StoreMetrics(), SLOTS * SLOT // 4, probe=self._probe,
            admission=admission, afar=[self.far], only_observed=observed,
        )  # fmt: skip
        self.session = Session()

    async def _probe(self, keys: Iterable[BlockKey]) -> None:
        self.probed.extend(keys)

    def offer(self, blocks: int) -> list[SealedBlock]:
        """Have another region hold a chain."""
        chain = random_chain(random.Random(1), blocks, LENGTH)
        self.far.blocks.update((block.key, block) for block in chain)
        return chain

    async def acquire(self, keys: list[BlockKey], timeout: float = 30.0) -> list[Medium]:
        media = (await self.store.acquire(self.session, keys, timeout)).media
        self.store.release(self.session, keys)
        return media


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.far.gate.set()
    await rig.store.close()


async def test_it_is_found_last_delivered_and_written_down_here(rig: Rig) -> None:
    chain = rig.offer(6)
    keys = keys_of(chain)
    rig.disk.blocks.update((block.key, block) for block in chain[:2])
    found = rig.store.lookup(keys)
    assert found.runs == ((Medium.DISK, 2), (Medium.REMOTE, 4))
    assert rig.store.holds(keys) == [True] * 6
    assert await rig.acquire(keys) == [Medium.DISK] * 2 + [Medium.REMOTE] * 4
    assert rig.probed == keys[2:6], "the region's own bucket may have it by now"
    assert await rig.store.drain(30)
    assert rig.bucket.blocks.keys() == rig.disk.blocks.keys() == set(keys)
    assert await rig.acquire(keys) == [Medium.HOST] * 6


async def test_what_came_from_afar_is_kept_whatever_admission_says() -> None:
    rig = Rig(admission=AdmissionPolicy(Traffic(1000), None, Mode.ENFORCE))
    keys = keys_of(rig.offer(3))
    assert await rig.acquire(keys) == [Medium.REMOTE] * 3
    assert await rig.store.drain(30)
    assert rig.bucket.blocks.keys() == rig.disk.blocks.keys() == set(keys)
    await rig.store.close()


async def test_what_is_only_afar_is_saved_here(rig: Rig) -> None:
    chain = rig.offer(2)
    blocks = [NewBlock(b.key, b.header.parent, b.header.index) for b in chain]
    answers = rig.store.reserve(rig.session, NAMESPACE, LENGTH, 64, blocks)
    assert not any(isinstance(answer, Miss) for answer in answers)
    assert len(await rig.store.commit(rig.session, keys_of(chain), durable=Medium.OBJECT)) == 2
    again = rig.store.reserve(rig.session, NAMESPACE, LENGTH, 64, blocks)
    assert again == [Miss.PRESENT] * 2


async def test_deleting_forgets_it(rig: Rig) -> None:
    keys = keys_of(rig.offer(3))
    assert await rig.store.delete(keys[:1]) == {Medium.OBJECT: 0, Medium.DISK: 0, Medium.HOST: 0}
    assert rig.store.lookup(keys).blocks == 0
    await rig.store.delete(keys, [Medium.HOST, Medium.DISK])
    assert rig.store.lookup(keys[1:]).blocks == 2


async def test_an_observed_tier_is_counted_and_not_read() -> None:
    rig = Rig(observed=True)
    chain = rig.offer(5)
    keys = keys_of(chain)
    rig.disk.blocks.update((block.key, block) for block in (chain[0], chain[4]))
    assert rig.store.lookup(keys).runs == ((Medium.DISK, 1),)
    assert rig.store.beyond(keys[1:]) == [(Medium.REMOTE, 3), (Medium.DISK, 1)]
    assert await rig.acquire(keys) == [Medium.DISK]
    assert rig.far.gets == 0
    await rig.store.close()


async def test_the_long_way_is_gone_once_for_what_is_promised(rig: Rig) -> None:
    keys = keys_of(rig.offer(BURST + 40))
    rig.store.promoter.promises.make(keys, Medium.REMOTE, LENGTH, 1e12)
    rig.far.gate.clear()
    first = asyncio.create_task(rig.acquire(keys[:16]))
    await settle()
    assert rig.far.asked == keys[:16], "before it is known how fast that way is, no more than is asked for"
    rig.far.gate.set()
    assert await first == [Medium.REMOTE] * 16
    rig.far.gate.clear()
    second = asyncio.create_task(rig.acquire(keys[16:32]))
    await settle()
    assert rig.far.asked == keys[: 16 + BURST]
    rig.far.gate.set()
    assert await second == [Medium.REMOTE] * 16
    await settle()
    assert await rig.acquire(keys[32:48]) == [Medium.REMOTE] * 16, "though it is in memory by now"
    assert await rig.acquire(keys[32:48]) == [Medium.HOST] * 16
    assert len(rig.far.asked) == 16 + BURST, "and nothing twice"


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("bytes_per_second", "prefill", "reason", "loads"),
    [
        (None, False, Reason.NOT_STORED, 0),
        (None, True, Reason.UNMEASURED, 32),
        (1e4, True, Reason.RECOMPUTE, 0),
        (1e9, True, Reason.LOAD, 32),
    ],
)
async def test_the_planner_takes_a_fast_way_and_refuses_a_slow_one(
    rig: Rig, bytes_per_second: float | None, prefill: bool, reason: Reason, loads: int
) -> None:
    keys = keys_of(rig.offer(32))
    planning = Planning(rig.store, Mode.ENFORCE, Wait())
    if bytes_per_second is not None:
        for blocks in (1, 4, 16, 32):
            nbytes = blocks * LENGTH
            rig.store.promoter.meters[Medium.REMOTE].observe(nbytes, 0.02 + nbytes / bytes_per_second)
    for tokens in (256, 1024, 2048) if prefill else ():
        for _ in range(5):
            planning.step(KNOWN, tokens, tokens * tokens / 2, tokens * 1e-3)
    decision = planning.decide(KNOWN, keys, 0, rig.store.lookup(keys).runs)
    assert (decision.reason, decision.blocks) == (reason, loads)
    await settle()
    if reason is Reason.RECOMPUTE:
        assert len(rig.far.asked) == 4, "a few, to see whether the way has become faster"
        planning.decide(KNOWN, keys, 0, rig.store.lookup(keys).runs)
        await settle()
        assert len(rig.far.asked) == 4
    else:
        assert not rig.far.asked
