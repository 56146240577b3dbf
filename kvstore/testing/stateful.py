"""A tier against a dict: a Hypothesis state machine for any implementation.

class MyMachine(TierMachine):
    async def open(self, directory):
        return await MyTier.open(directory, TierMachine.CAPACITY_BYTES)

TestMyTier = MyMachine.TestCase
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import BlockNotFound
from kvstore.identity import BlockKey
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_chain
from kvstore.tiers.base import PutResult, Tier

T = TypeVar("T")

_SOURCE = random.Random(7)
BLOCKS: list[SealedBlock] = [block for size in (1, 5_000, 100_000, 300_000) for block in random_chain(_SOURCE, 8, size)]
"""Four chains, each of another size class; together more than a tier of CAPACITY_BYTES can hold."""

_numbers = st.integers(0, len(BLOCKS) - 1)
_several = st.lists(_numbers, min_size=1, max_size=8)


class TierMachine(RuleBasedStateMachine):
    """Puts, gets, deletes, touches and restarts, in any order. Subclasses define ``open``."""

    CAPACITY_BYTES = 2 << 20

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="tier-machine-"))
        self.stored: dict[BlockKey, SealedBlock] = {}
        """What the tier may hold; all of it while nothing was evicted."""
        self.hits: dict[BlockKey, int] = {}
        self.evicted_before = 0
        self.tier = self.run(self.open(self.directory))

    async def open(self, directory: Path) -> Tier:
        """A tier of CAPACITY_BYTES in ``directory``, which may hold what an earlier one left there."""
        raise NotImplementedError

    async def reopen(self, tier: Tier) -> Tier | None:
        """Restart. None: this tier is not persistent."""
        return None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @rule(numbers=_several)
    def put(self, numbers: list[int]) -> None:
        blocks = [BLOCKS[number] for number in numbers]

        async def put_all() -> list[PutResult]:
            return list(await asyncio.gather(*(self.tier.put(block.header, block.envelope) for block in blocks)))

        for block, result in zip(blocks, self.run(put_all()), strict=True):
            if result is PutResult.STORED:
                self.stored[block.key] = block
                self.hits[block.key] = 0
            elif result is PutResult.PRESENT:
                assert block.key in self.stored

    @rule(number=_numbers)
    def get(self, number: int) -> None:
        block = BLOCKS[number]
        buffer = aligned_buffer(len(block.envelope))
        held = block.key in self.tier.keys()
        try:
            header = self.run(self.tier.get(block.key, buffer))
        except BlockNotFound:
            assert not held
        else:
            assert held
            assert header == block.header
            assert buffer == block.envelope

    @rule(numbers=_several)
    def delete(self, numbers: list[int]) -> None:
        keys = {BLOCKS[number].key for number in numbers}
        held = len(keys & self.tier.keys())
        assert self.run(self.tier.delete(keys)) == held
        for key in keys:
            self.stored.pop(key, None)

    @rule(numbers=st.sets(_numbers, min_size=1))
    def touch(self, numbers: set[int]) -> None:
        keys = [BLOCKS[number].key for number in sorted(numbers)]
        held = self.tier.keys() & set(keys)
        self.tier.touch(keys)
        for key in held:
            self.hits[key] += 1

    @rule()
    def restart(self) -> None:
        evicted, before = self.tier.stats().evicted, set(self.tier.keys())
        tier = self.run(self.reopen(self.tier))
        if tier is not None:
            self.tier = tier
            self.evicted_before += evicted
            # What was being evicted ahead of need may be gone; nothing else may be, and nothing may be new.
            assert set(tier.keys()) <= before

    @invariant()
    def holds_what_was_stored(self) -> None:
        stats = self.tier.stats()
        assert stats.blocks == len(self.tier.keys())
        assert self.tier.keys() <= self.stored.keys()
        assert stats.capacity_bytes is None or stats.used_bytes <= stats.capacity_bytes
        if not self.evicted_before + stats.evicted:
            assert self.tier.keys() == self.stored.keys()
        assert stats.quarantined == 0

    @invariant()
    def knows_its_blocks(self) -> None:
        for key in self.tier.keys():
            stat = self.tier.stat(key)
            assert stat is not None
            assert stat.length == self.stored[key].header.length
            assert stat.hits == self.hits[key]

    def teardown(self) -> None:
        self.run(self.tier.close())
        self.loop.close()
        shutil.rmtree(self.directory)
