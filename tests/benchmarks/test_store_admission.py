"""A node's store admits to its disk as the study of traces does: the same requests cost the same writes and find the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from unittest import mock

import pytest

from benchmarks.traces.replay import Keyed, keyed
from benchmarks.traces.tiers import DISK_SHARE, HOST_SHARE, Tally, run_tiers
from benchmarks.traces.variants import documents
from kvstore.envelope import Header, envelope_bytes
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import BlockIndex
from kvstore.leases import Session
from kvstore.node.api import Miss, NewBlock
from kvstore.node.arena import Arena
from kvstore.policy.admission import AdmissionPolicy, Mode
from kvstore.policy.eviction import eviction_order
from kvstore.policy.reuse import Reuse, Traffic
from kvstore.store import Store
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats
from kvstore.tiers.host import HostTier

LENGTH = 8
SLOT = envelope_bytes(LENGTH)


class IndexTier(Tier):
    """A disk of so many blocks without their bytes."""

    medium = Medium.DISK

    def __init__(self, blocks: int, policy: Reuse) -> None:
        self._capacity, self._policy = blocks, policy
        self.index = BlockIndex()
        self.now = 0.0
        self.writes = 0

    def keys(self):  # type: ignore[no-untyped-def]
        return self.index.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        row = self.index.row(key)
        return self.index.stat(row) if row is not None else None

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self.index.touch(keys, self.now)

    def stats(self) -> TierStats:
        return TierStats(self.medium, len(self.index), 0, self._capacity * LENGTH)

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        if header.key in self.index:
            return PutResult.PRESENT
        if len(self.index) >= self._capacity:
            order = eviction_order(self.index, self._policy, self.index.used(), self.now)
            for row in order[: max(1, self._capacity // 64)].tolist():
                self.index.remove(self.index.key(row))
        self.index.add(header, 0, self.now)
        self.writes += 1
        return PutResult.STORED

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        row = self.index.row(key)
        assert row is not None
        parent, index = self.index.parent(row), int(self.index.depth[row])
        header = Header(key=key, namespace=bytes(16), parent=parent, index=index, tokens=64, length=LENGTH, crc=0)
        header.pack_into(into)
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        return sum(self.index.remove(key) is not None for key in keys)

    async def close(self) -> None:
        pass


async def play(source: Keyed, mode: Mode) -> Tally:
    """The requests of a trace, by a store of the sizes of the study, at the times of the trace."""
    unique = source.trace.unique
    traffic = Traffic()
    extent = int(unique * HOST_SHARE) * SLOT
    host = HostTier(Arena.create(extent, epoch=1), extent, Reuse(traffic))
    disk = IndexTier(int(unique * DISK_SHARE), Reuse(traffic))
    admission = AdmissionPolicy(traffic, mode=mode)
    with mock.patch("time.monotonic", return_value=source.trace.requests[0].time):
        store = Store(host, [disk], StoreMetrics(), 1 << 30, writers=8, admission=admission)
    session, tally = Session(), Tally()
    for request in source.trace.requests:
        with (
            mock.patch("time.time", return_value=request.time),
            mock.patch("time.monotonic", return_value=request.time),
        ):
            disk.now = request.time
            chain = [source.keys[block] for block in request.blocks]
            traffic.observe(chain, request.time)
            found = store.lookup(chain)
            tally.host_hits += sum(count for medium, count in found.runs if medium is Medium.HOST)
            tally.disk_hits += sum(count for medium, count in found.runs if medium is Medium.DISK)
            for at in range(0, found.blocks, 16):
                await store.acquire(session, chain[at : at + 16], 30.0)
                store.release(session, chain[at : at + 16])
            blocks = [
                NewBlock(key, above, at)
                for at, (key, above) in enumerate(zip(chain, [NO_PARENT, *chain], strict=False))
            ][found.blocks :]
            for at in range(0, len(blocks), 16):
                part = blocks[at : at + 16]
                answers = store.reserve(session, bytes(16), LENGTH, 64, part)
                granted = [
                    block.key for block, answer in zip(part, answers, strict=True) if not isinstance(answer, Miss)
                ]
                tally.host_writes += len(granted)
                await store.commit(session, granted)
            await asyncio.gather(*(queue.drain() for queue in store._queues))
    tally.disk_writes = disk.writes
    await store.close()
    return tally


async def test_enforced_admission_saves_the_writes_that_the_study_reports() -> None:
    source = keyed(documents(150))
    everything, studied = run_tiers(source, Mode.OFF), run_tiers(source, Mode.ENFORCE)
    stored = await play(source, Mode.ENFORCE)
    assert stored.disk_writes < 0.9 * everything.disk_writes
    assert stored.disk_writes == pytest.approx(studied.disk_writes, rel=0.1)
    assert stored.hits == pytest.approx(studied.hits, rel=0.05)
