"""What every tier must do, as a test suite to subclass.

    class TestMyTier(TierConformance):
        async def open(self, directory, capacity_bytes):
            return await MyTier.open(directory, capacity_bytes)

Override ``reopen`` and ``damage`` where the medium allows it; tests that need what is not there are skipped. The suite
needs pytest and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.envelope import HEADER_BYTES, envelope_bytes, verify
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge
from kvstore.identity import BlockKey
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_block, random_chain, random_key
from kvstore.tiers.base import PutResult, Tier

CAPACITY_BYTES = 16 << 20
PAYLOAD_BYTES = 100_000
BLOCKS_BEYOND_CAPACITY = 2 * CAPACITY_BYTES // envelope_bytes(PAYLOAD_BYTES)

ODD_SIZES = [1, 511, 4095, 4096, 4097, 100_003, (1 << 20) + 1, 3 << 20]


class Damage(Enum):
    """Ways in which a stored block goes bad."""

    PAYLOAD_BIT = "payload bit"
    HEADER_BIT = "header bit"
    TRUNCATED = "truncated"
    SWAPPED = "another block's bytes"
    OVERSIZE = "longer than it should be"


class TierConformance:
    """The contract of ``kvstore.tiers.base``. Subclasses must define ``open``."""

    pytestmark = pytest.mark.asyncio

    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        """An empty tier that evicts the least recently used blocks first. A medium without a limit ignores the capacity."""
        raise NotImplementedError

    async def reopen(self, tier: Tier) -> Tier | None:
        """Close ``tier`` and open what it left behind, as a restart would. None: this tier is not persistent."""
        return None

    async def damage(self, tier: Tier, key: BlockKey, how: Damage) -> bool:
        """Damage a stored block behind the tier's back. False: this medium cannot be damaged this way."""
        return False

    @pytest_asyncio.fixture
    async def tier(self, tmp_path: Path) -> AsyncIterator[Tier]:
        tier = await self.open(tmp_path, CAPACITY_BYTES)
        yield tier
        await tier.close()

    @pytest.fixture
    def source(self) -> random.Random:
        return random.Random(1)

    # Round trips

    @pytest.mark.parametrize("size", ODD_SIZES)
    async def test_a_block_comes_back_as_it_was_put(self, tier: Tier, source: random.Random, size: int) -> None:
        block = random_block(source, size)
        assert await put(tier, block) is PutResult.STORED
        await assert_holds(tier, block)

    async def test_a_larger_buffer_is_not_written_beyond_the_block(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        buffer = aligned_buffer(len(block.envelope) + HEADER_BYTES)
        buffer[len(block.envelope) :] = b"\xa5" * HEADER_BYTES
        await tier.get(block.key, buffer)
        assert buffer[len(block.envelope) :] == b"\xa5" * HEADER_BYTES

    async def test_a_second_put_writes_nothing(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        assert await put(tier, block) is PutResult.STORED
        used = tier.stats().used_bytes
        assert await put(tier, block) is PutResult.PRESENT
        assert tier.stats().used_bytes == used
        await assert_holds(tier, block)

    async def test_an_unknown_block_is_not_found(self, tier: Tier, source: random.Random) -> None:
        key = random_key(source)
        with pytest.raises(BlockNotFound):
            await tier.get(key, aligned_buffer(HEADER_BYTES * 2))
        assert key not in tier.keys()
        assert tier.stat(key) is None

    async def test_a_block_that_does_not_fit_leaves_the_buffer_alone(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        buffer = aligned_buffer(len(block.envelope) - HEADER_BYTES)
        buffer[:] = b"\xa5" * len(buffer)
        with pytest.raises(BlockTooLarge):
            await tier.get(block.key, buffer)
        assert buffer == b"\xa5" * len(buffer)
        await assert_holds(tier, block)

    async def test_keys_and_stat_tell_what_is_held(self, tier: Tier, source: random.Random) -> None:
        chain = random_chain(source, 3, PAYLOAD_BYTES)
        for block in chain:
            await put(tier, block)
        assert set(tier.keys()) == {block.key for block in chain}
        for block in chain:
            stat = tier.stat(block.key)
            assert stat is not None
            assert (stat.key, stat.length) == (block.key, block.header.length)
        stats = tier.stats()
        assert stats.medium is tier.medium
        assert stats.blocks == 3
        assert stats.used_bytes >= 3 * PAYLOAD_BYTES

    # Deletion

    async def test_deleted_blocks_are_gone_and_counted(self, tier: Tier, source: random.Random) -> None:
        chain = random_chain(source, 4, PAYLOAD_BYTES)
        for block in chain:
            await put(tier, block)
        gone = [chain[2].key, chain[3].key, random_key(source)]
        assert await tier.delete(gone) == 2
        assert set(tier.keys()) == {chain[0].key, chain[1].key}
        with pytest.raises(BlockNotFound):
            await tier.get(chain[3].key, aligned_buffer(len(chain[3].envelope)))
        await assert_holds(tier, chain[0])
        assert await tier.delete(block.key for block in chain) == 2
        assert tier.stats().used_bytes == 0

    async def test_a_deleted_block_can_be_put_again(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        await tier.delete([block.key])
        assert await put(tier, block) is PutResult.STORED
        await assert_holds(tier, block)

    # Damage

    @pytest.mark.parametrize("how", Damage)
    async def test_a_bad_block_is_reported_once_and_heals(self, tier: Tier, source: random.Random, how: Damage) -> None:
        other, block = random_block(source, PAYLOAD_BYTES), random_block(source, PAYLOAD_BYTES)
        await put(tier, other)
        await put(tier, block)
        if not await self.damage(tier, block.key, how):
            pytest.skip("this medium cannot be damaged this way")
        buffer = aligned_buffer(len(block.envelope))
        with pytest.raises(BlockCorrupt):
            await tier.get(block.key, buffer)
        assert block.key not in tier.keys()
        with pytest.raises(BlockNotFound):
            await tier.get(block.key, buffer)
        assert tier.stats().quarantined == 1
        assert await put(tier, block) is PutResult.STORED
        await assert_holds(tier, block)
        await assert_holds(tier, other)

    async def test_many_readers_of_a_bad_block_count_it_once(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        if not await self.damage(tier, block.key, Damage.PAYLOAD_BIT):
            pytest.skip("this medium cannot be damaged")
        buffers = [aligned_buffer(len(block.envelope)) for _ in range(4)]
        answers = await asyncio.gather(*(tier.get(block.key, b) for b in buffers), return_exceptions=True)
        assert {type(answer) for answer in answers} <= {BlockCorrupt, BlockNotFound}
        assert tier.stats().quarantined == 1

    # Capacity and eviction

    async def test_the_capacity_is_never_exceeded(self, tier: Tier, source: random.Random) -> None:
        capacity = tier.stats().capacity_bytes
        if capacity is None:
            pytest.skip("a medium without a limit")
        blocks = [random_block(source, PAYLOAD_BYTES) for _ in range(BLOCKS_BEYOND_CAPACITY)]
        highest = 0

        async def store(block: SealedBlock) -> PutResult:
            nonlocal highest
            result = await put(tier, block)
            highest = max(highest, tier.stats().used_bytes)
            return result

        results = await asyncio.gather(*map(store, blocks))
        assert 0 < highest <= capacity
        assert set(results) <= {PutResult.STORED, PutResult.REFUSED}
        assert results.count(PutResult.REFUSED) == tier.stats().refused
        held = [block for block in blocks if block.key in tier.keys()]
        assert len(held) == tier.stats().blocks == results.count(PutResult.STORED) - tier.stats().evicted
        for block in held:
            await assert_holds(tier, block)

    async def test_chains_lose_their_tails_first(self, tier: Tier, source: random.Random) -> None:
        if tier.stats().capacity_bytes is None:
            pytest.skip("a medium without a limit")
        chains = [random_chain(source, 8, PAYLOAD_BYTES) for _ in range(BLOCKS_BEYOND_CAPACITY // 8)]
        for chain in chains:
            for block in chain:
                await put(tier, block)
            for known in chains:
                present = [block.key in tier.keys() for block in known]
                assert present == sorted(present, reverse=True), "a suffix was orphaned"
        assert tier.stats().evicted > 0

    async def test_touched_blocks_outlive_the_others(self, tier: Tier, source: random.Random) -> None:
        if tier.stats().capacity_bytes is None:
            pytest.skip("a medium without a limit")
        while tier.stats().evicted == 0:
            assert await put(tier, random_block(source, PAYLOAD_BYTES)) is PutResult.STORED
        oldest_first = sorted(tier.keys(), key=lambda key: accessed(tier, key))
        touched, rest = oldest_first[: len(oldest_first) // 4], oldest_first[len(oldest_first) // 4 :]
        tier.touch(touched)
        for _ in range(len(oldest_first) // 2):
            assert await put(tier, random_block(source, PAYLOAD_BYTES)) is PutResult.STORED
        assert set(touched) <= set(tier.keys())
        assert not set(rest) <= set(tier.keys())

    # Concurrency

    async def test_concurrent_puts_of_one_key_store_it_once(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        results = await asyncio.gather(*(put(tier, block) for _ in range(8)))
        assert sorted(result.value for result in results) == ["present"] * 7 + ["stored"]
        assert tier.stats().blocks == 1
        await assert_holds(tier, block)

    async def test_concurrent_gets_of_one_key(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        await asyncio.gather(*(assert_holds(tier, block) for _ in range(16)))

    async def test_gets_during_eviction_are_right_or_not_found(self, tier: Tier, source: random.Random) -> None:
        blocks = [random_block(source, PAYLOAD_BYTES) for _ in range(BLOCKS_BEYOND_CAPACITY)]

        async def read_back(block: SealedBlock) -> None:
            await put(tier, block)
            try:
                await assert_holds(tier, block)
            except BlockNotFound:
                pass

        await asyncio.gather(*map(read_back, blocks))
        assert tier.stats().quarantined == 0

    async def test_gets_during_deletion_are_right_or_not_found(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        for _ in range(20):
            await put(tier, block)
            buffers = [aligned_buffer(len(block.envelope)) for _ in range(4)]
            gets = [asyncio.ensure_future(tier.get(block.key, buffer)) for buffer in buffers]
            await tier.delete([block.key])
            for answer, buffer in zip(await asyncio.gather(*gets, return_exceptions=True), buffers, strict=True):
                assert answer == block.header or isinstance(answer, BlockNotFound)
                assert isinstance(answer, BlockNotFound) or buffer == block.envelope
        assert tier.stats().quarantined == 0

    async def test_a_cancelled_get_stops_writing_to_the_buffer(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, 1 << 20)
        await put(tier, block)
        mark = b"\xa5" * len(block.envelope)
        for turns in range(20):
            buffer = aligned_buffer(len(block.envelope))
            get = asyncio.ensure_future(tier.get(block.key, buffer))
            for _ in range(turns):
                await asyncio.sleep(0)
            get.cancel()
            await asyncio.gather(get, return_exceptions=True)
            buffer[:] = mark
            await assert_holds(tier, block)
            assert buffer == mark

    async def test_a_cancelled_put_leaves_all_or_nothing(self, tier: Tier, source: random.Random) -> None:
        for turns in range(20):
            block = random_block(source, PAYLOAD_BYTES)
            original = bytes(block.envelope)
            storing = asyncio.ensure_future(put(tier, block))
            for _ in range(turns):
                await asyncio.sleep(0)
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)
            block.envelope[HEADER_BYTES:] = bytes(len(block.envelope) - HEADER_BYTES)
            block.envelope[:] = original
            if block.key not in tier.keys():
                assert await put(tier, block) in (PutResult.STORED, PutResult.PRESENT)
            await assert_holds(tier, block)
        assert tier.stats().quarantined == 0

    # Restart

    async def test_a_restart_keeps_everything(self, tier: Tier, source: random.Random) -> None:
        chain = random_chain(source, 12, PAYLOAD_BYTES)
        for block in chain:
            await put(tier, block)
        await tier.delete([chain[-1].key])
        tier.touch([chain[3].key])
        tier.touch([chain[3].key, chain[1].key])
        before = {block.key: tier.stat(block.key) for block in chain[:-1]}
        used = tier.stats().used_bytes
        tier = await self._restarted(tier)
        try:
            assert set(tier.keys()) == set(before)
            assert tier.stats().used_bytes == used
            assert {key: tier.stat(key) for key in before} == before
            for block in chain[:-1]:
                await assert_holds(tier, block)
        finally:
            await tier.close()

    async def test_a_restart_keeps_the_order_of_eviction(self, tier: Tier, source: random.Random) -> None:
        if tier.stats().capacity_bytes is None:
            pytest.skip("a medium without a limit")
        while tier.stats().evicted == 0:
            await put(tier, random_block(source, PAYLOAD_BYTES))
        oldest_first = sorted(tier.keys(), key=lambda key: accessed(tier, key))
        touched = oldest_first[: len(oldest_first) // 4]
        tier.touch(touched)
        tier = await self._restarted(tier)
        try:
            for _ in range(len(oldest_first) // 2):
                await put(tier, random_block(source, PAYLOAD_BYTES))
            assert set(touched) <= set(tier.keys())
            assert not set(oldest_first) <= set(tier.keys())
        finally:
            await tier.close()

    async def test_a_restart_does_not_bring_bad_blocks_back(self, tier: Tier, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        await put(tier, block)
        if not await self.damage(tier, block.key, Damage.PAYLOAD_BIT):
            pytest.skip("this medium cannot be damaged")
        with pytest.raises(BlockCorrupt):
            await tier.get(block.key, aligned_buffer(len(block.envelope)))
        tier = await self._restarted(tier)
        try:
            assert block.key not in tier.keys()
            assert tier.stats().used_bytes == 0
        finally:
            await tier.close()

    async def test_closing_twice_does_no_harm(self, tier: Tier) -> None:
        await tier.close()
        await tier.close()

    async def _restarted(self, tier: Tier) -> Tier:
        again = await self.reopen(tier)
        if again is None:
            pytest.skip("not persistent")
        return again


async def put(tier: Tier, block: SealedBlock) -> PutResult:
    return await tier.put(block.header, block.envelope)


async def assert_holds(tier: Tier, block: SealedBlock) -> None:
    """The tier hands out exactly this block. Raises what ``get`` raises."""
    buffer = aligned_buffer(len(block.envelope))
    header = await tier.get(block.key, buffer)
    assert header == block.header
    assert buffer == block.envelope
    assert verify(buffer, block.key) == header


def accessed(tier: Tier, key: BlockKey) -> float:
    stat = tier.stat(key)
    assert stat is not None
    return stat.accessed
