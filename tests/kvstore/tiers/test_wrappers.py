from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.envelope import envelope_bytes
from kvstore.errors import BlockCorrupt, BlockNotFound, TierUnavailable
from kvstore.testing.blocks import aligned_buffer, random_block
from kvstore.testing.conformance import PAYLOAD_BYTES, TierConformance, assert_holds, put
from kvstore.tiers.base import Medium, PutResult, Tier
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.wrappers import Breaker, BreakerState, Faults, Faulty, Metered, TierMetrics


async def folder_tier(directory: Path, capacity_bytes: int | None = None) -> ObjectTier:
    tier = await ObjectTier.open(ObjectSettings(url=f"file://{directory}/store", capacity_bytes=capacity_bytes))
    await tier.ready.wait()
    return tier


class TestAllWrappersTogether(TierConformance):
    """A stack of wrappers that have nothing to do is invisible."""

    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        inner = await folder_tier(directory, capacity_bytes)
        return Metered(Breaker(Faulty(inner, Faults())), TierMetrics(CollectorRegistry()))


@pytest.fixture
async def inner(tmp_path: Path) -> AsyncIterator[ObjectTier]:
    tier = await folder_tier(tmp_path)
    yield tier
    await tier.close()


@pytest.fixture
def source() -> random.Random:
    return random.Random(3)


class TestMetered:
    async def test_it_counts_outcomes_and_bytes(self, inner: ObjectTier, source: random.Random) -> None:
        registry = CollectorRegistry()
        tier = Metered(inner, TierMetrics(registry))
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        await put(tier, block)
        await assert_holds(tier, block)
        await tier.delete([block.key])
        with pytest.raises(BlockNotFound):
            await assert_holds(tier, block)

        def operations(operation: str, outcome: str) -> float | None:
            labels = {"tier": "object", "operation": operation, "outcome": outcome}
            return registry.get_sample_value("kvstore_tier_operations_total", labels)

        assert operations("put", "stored") == operations("put", "present") == 1
        assert operations("get", "ok") == operations("get", "not_found") == 1
        assert operations("delete", "ok") == 1
        size = envelope_bytes(PAYLOAD_BYTES)
        for operation in ("put", "get"):
            labels = {"tier": "object", "operation": operation}
            assert registry.get_sample_value("kvstore_tier_bytes_total", labels) == size
            assert registry.get_sample_value("kvstore_tier_seconds_count", labels) == 2

    async def test_it_counts_failures(self, inner: ObjectTier, source: random.Random) -> None:
        registry = CollectorRegistry()
        tier = Metered(Faulty(inner, Faults(unavailable=1)), TierMetrics(registry))
        with pytest.raises(TierUnavailable):
            await put(tier, random_block(source, PAYLOAD_BYTES))
        labels = {"tier": Medium.OBJECT.value, "operation": "put", "outcome": "unavailable"}
        assert registry.get_sample_value("kvstore_tier_operations_total", labels) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestBreaker:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def faulty(self, inner: ObjectTier) -> Faulty:
        return Faulty(inner, Faults())

    @pytest.fixture
    def breaker(self, faulty: Faulty, clock: Clock) -> Breaker:
        return Breaker(faulty, failures=3, first_delay=1.0, last_delay=4.0, clock=clock)

    async def fail(self, breaker: Breaker, times: int) -> None:
        for _ in range(times):
            with pytest.raises(TierUnavailable):
                await breaker.delete([])

    async def test_it_opens_after_failures_in_a_row_only(self, breaker: Breaker, faulty: Faulty) -> None:
        for _ in range(3):
            faulty.faults = Faults(unavailable=1)
            await self.fail(breaker, 2)
            faulty.faults = Faults()
            await breaker.delete([])
        assert breaker.state is BreakerState.CLOSED
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        assert breaker.state is BreakerState.OPEN

    async def test_an_open_breaker_asks_nothing_and_offers_nothing(
        self, breaker: Breaker, faulty: Faulty, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(breaker, block)
        assert block.key in breaker.keys()
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        faulty.faults = Faults()  # it would answer again, but is not asked
        assert block.key not in breaker.keys()
        with pytest.raises(TierUnavailable):
            await assert_holds(breaker, block)
        with pytest.raises(TierUnavailable):
            await put(breaker, random_block(source, PAYLOAD_BYTES))
        assert len(faulty.keys()) == 1

    async def test_one_success_after_the_delay_closes_it(
        self, breaker: Breaker, faulty: Faulty, clock: Clock, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(breaker, block)
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        faulty.faults = Faults()
        clock.now += 1.0
        assert breaker.state is BreakerState.HALF_OPEN
        assert block.key in breaker.keys()
        await assert_holds(breaker, block)
        assert breaker.state is BreakerState.CLOSED

    async def test_the_delay_grows_to_its_limit_and_starts_anew(
        self, breaker: Breaker, faulty: Faulty, clock: Clock
    ) -> None:
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        for delay in (1.0, 2.0, 4.0, 4.0):
            clock.now += delay - 0.01
            assert breaker.state is BreakerState.OPEN
            clock.now += 0.01
            await self.fail(breaker, 1)
            assert breaker.state is BreakerState.OPEN
        clock.now += 4.0
        faulty.faults = Faults()
        await breaker.delete([])
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        clock.now += 1.0
        assert breaker.state is BreakerState.HALF_OPEN

    async def test_a_half_open_breaker_lets_one_through(
        self, breaker: Breaker, faulty: Faulty, clock: Clock, source: random.Random
    ) -> None:
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        clock.now += 1.0
        faulty.faults = Faults(delay=0.01)
        blocks = [random_block(source, PAYLOAD_BYTES) for _ in range(4)]
        results = await gather_results(*(put(breaker, block) for block in blocks))
        assert results.count(PutResult.STORED) == 1
        assert sum(isinstance(result, TierUnavailable) for result in results) == 3
        assert breaker.state is BreakerState.CLOSED

    async def test_a_cancelled_trial_leaves_it_half_open(self, breaker: Breaker, faulty: Faulty, clock: Clock) -> None:
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 3)
        clock.now += 1.0
        faulty.faults = Faults(delay=60)
        trial = asyncio.ensure_future(breaker.delete([]))
        await asyncio.sleep(0.01)
        trial.cancel()
        await asyncio.wait([trial])
        faulty.faults = Faults()
        await breaker.delete([])
        assert breaker.state is BreakerState.CLOSED

    async def test_a_miss_is_an_answer(self, breaker: Breaker, faulty: Faulty, source: random.Random) -> None:
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 2)
        faulty.faults = Faults()
        with pytest.raises(BlockNotFound):
            await assert_holds(breaker, random_block(source, PAYLOAD_BYTES))
        faulty.faults = Faults(unavailable=1)
        await self.fail(breaker, 2)
        assert breaker.state is BreakerState.CLOSED


class TestFaulty:
    async def test_the_same_seed_gives_the_same_faults(self, inner: ObjectTier) -> None:
        async def outcomes(seed: int) -> list[bool]:
            tier = Faulty(inner, Faults(unavailable=0.5), seed)
            results = await gather_results(*(tier.delete([]) for _ in range(64)))
            return [isinstance(result, TierUnavailable) for result in results]

        first = await outcomes(1)
        assert first == await outcomes(1) != await outcomes(2)
        assert 16 < sum(first) < 48

    async def test_a_corrupted_block_is_gone_and_can_be_put_again(
        self, inner: ObjectTier, source: random.Random
    ) -> None:
        tier = Faulty(inner, Faults(corrupt=1))
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        buffer = aligned_buffer(len(block.envelope))
        with pytest.raises(BlockCorrupt):
            await tier.get(block.key, buffer)
        assert buffer != block.envelope
        assert block.key not in tier.keys()
        tier.faults = Faults()
        assert await put(tier, block) is PutResult.STORED
        await assert_holds(tier, block)


async def gather_results(*awaitables: Awaitable[object]) -> list[object]:
    return list(await asyncio.gather(*awaitables, return_exceptions=True))
