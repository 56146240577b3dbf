"""Copies between two real S3 servers, over a link that can be shaped and cut."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace

import obstore
import pytest
from region_cases import PAYLOAD_BYTES, chain, hot, store, stored

from kvstore.errors import TierUnavailable
from kvstore.testing.blocks import SealedBlock
from kvstore.testing.servers import S3Server
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import Bucket, ObjectSettings
from kvstore.tiers.object.bucket import connect
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication import links as links_module
from replication import rate as rate_module
from replication.copier import Copied, Outcome, ServerSide, Streamed, Window, copy
from replication.links import Links
from replication.manifest import HotBlock
from replication.rate import RateLimit

pytestmark = pytest.mark.s3


async def copied(
    sources: list[ObjectSettings], destination: ObjectSettings, blocks: list[HotBlock], patience: float = 5.0
) -> Copied:
    result = Copied()
    async with Links.open(sources, patience) as far, Links.open([destination]) as near:
        await copy(blocks, Streamed(far, near, RateLimit(None), Window()), result.add)
    return result


def overwrite(settings: ObjectSettings, block: SealedBlock, body: bytes) -> None:
    obstore.put(Objects.connect(settings).store, block_name(block.header.namespace, block.key), body)


async def test_blocks_arrive_as_they_are(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    blocks = chain(random_source, 20)
    store(na, blocks)
    result = await copied([na_far], eu, hot(blocks))
    assert result.outcomes == {Outcome.COPIED: 20}
    assert result.nbytes == sum(b.header.envelope_bytes for b in blocks)
    assert stored(eu) == {b.key: bytes(b.envelope) for b in blocks}


async def test_a_second_run_sends_nothing(
    na: ObjectSettings,
    na_far: ObjectSettings,
    eu: ObjectSettings,
    link: ShapedLink,
    random_source: random.Random,
) -> None:
    blocks = chain(random_source, 10)
    store(na, blocks)
    await copied([na_far], eu, hot(blocks))
    before = link.connections
    result = await copied([na_far], eu, hot(blocks))
    assert result.outcomes == {Outcome.PRESENT: 10}
    assert link.connections == before


async def test_what_is_damaged_at_rest_is_never_created_nor_is_what_continues_it(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    blocks = chain(random_source, 5)
    store(na, blocks)
    damaged = bytearray(blocks[2].envelope)
    damaged[4096 + 17] ^= 1
    overwrite(na, blocks[2], bytes(damaged))
    result = await copied([na_far], eu, hot(blocks))
    assert result.outcomes == {Outcome.COPIED: 2, Outcome.CORRUPT: 1, Outcome.ORPHANED: 2}
    assert stored(eu).keys() == {b.key for b in blocks[:2]}


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, 20480])
async def test_an_object_of_a_wrong_size_is_not_created(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random, size: int
) -> None:
    blocks = chain(random_source, 1)
    store(na, blocks)
    overwrite(na, blocks[0], bytes(blocks[0].envelope)[:size].ljust(size, b"\0"))
    assert (await copied([na_far], eu, hot(blocks))).outcomes == {Outcome.CORRUPT: 1}
    assert stored(eu) == {}


async def test_another_blocks_bytes_are_not_created(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    mine, other = chain(random_source, 1), chain(random_source, 1)
    store(na, mine)
    overwrite(na, mine[0], bytes(other[0].envelope))
    assert (await copied([na_far], eu, hot(mine))).outcomes == {Outcome.CORRUPT: 1}


async def test_what_a_link_damages_is_asked_for_again(
    na: ObjectSettings,
    na_far: ObjectSettings,
    eu: ObjectSettings,
    link: ShapedLink,
    random_source: random.Random,
) -> None:
    blocks = chain(random_source, 3)
    store(na, blocks)
    link.corrupt(blocks[1].payload[5000:5016])
    result = await copied([na_far], eu, hot(blocks))
    assert link.corrupted == 1
    assert result.outcomes == {Outcome.COPIED: 3}
    assert stored(eu) == {b.key: bytes(b.envelope) for b in blocks}


async def test_a_link_that_always_damages_creates_nothing(
    na: ObjectSettings,
    na_far: ObjectSettings,
    eu: ObjectSettings,
    link: ShapedLink,
    random_source: random.Random,
) -> None:
    blocks = chain(random_source, 2)
    store(na, blocks)
    link.corrupt(blocks[0].payload[5000:5016], times=99)
    result = await copied([na_far], eu, hot(blocks))
    assert link.corrupted == 2
    assert result.outcomes == {Outcome.CORRUPT: 1, Outcome.ORPHANED: 1}
    assert stored(eu) == {}


async def test_a_block_that_is_gone_is_left_out(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    blocks = chain(random_source, 3)
    store(na, [blocks[0], blocks[2]])
    assert (await copied([na_far], eu, hot(blocks))).outcomes == {
        Outcome.COPIED: 1,
        Outcome.GONE: 1,
        Outcome.ORPHANED: 1,
    }


async def test_a_stump_in_the_destination_is_replaced(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    blocks = chain(random_source, 1)
    store(na, blocks)
    overwrite(eu, blocks[0], b"stump")
    assert (await copied([na_far], eu, hot(blocks))).outcomes == {Outcome.COPIED: 1}
    assert stored(eu) == {blocks[0].key: bytes(blocks[0].envelope)}


async def test_no_block_comes_before_its_parent(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    """Heads are large and slow to come, tails are small: the tails wait."""
    blocks = [*chain(random_source, 1, 2 << 20), *chain(random_source, 6)]
    joined = hot(blocks[:1]) + [replace(b, parent=a.key) for a, b in zip(hot(blocks), hot(blocks)[1:], strict=False)]
    resealed = [blocks[0]]
    for block, row in zip(blocks[1:], joined[1:], strict=True):
        header = replace(block.header, parent=row.parent)
        header.pack_into(block.envelope)
        resealed.append(SealedBlock(header, block.envelope))
    store(na, resealed)
    order: list[bytes] = []
    async with Links.open([na_far]) as far, Links.open([eu]) as near:
        await copy(joined, Streamed(far, near, RateLimit(None), Window()), lambda block, _: order.append(block.key))
    assert order == [block.key for block in joined]


async def test_a_dead_link_gives_way_to_the_next_and_comes_back(
    na: ObjectSettings,
    na_far: ObjectSettings,
    eu: ObjectSettings,
    link: ShapedLink,
    random_source: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links_module, "FIRST_RETRY_SECONDS", 0.0)
    blocks = chain(random_source, 30)
    store(na, blocks)
    with shaped(na.endpoint) as second:
        async with (
            Links.open([na_far, replace(na, endpoint=second.endpoint)]) as far,
            Links.open([eu]) as near,
        ):
            transfer = Streamed(far, near, RateLimit(None), Window())
            await copy(hot(blocks)[:10], transfer)
            assert second.connections == 0
            link.cut()
            await copy(hot(blocks)[:20], transfer)
            assert second.connections > 0
            link.heal()
            link.reset()
            used = second.bytes_down
            await copy(hot(blocks), transfer)
            assert second.bytes_down == used
    assert stored(eu).keys() == {b.key for b in blocks}


async def test_with_every_link_cut_the_copy_ends_and_later_goes_on(
    na: ObjectSettings,
    na_far: ObjectSettings,
    eu: ObjectSettings,
    link: ShapedLink,
    random_source: random.Random,
) -> None:
    blocks = chain(random_source, 12)
    store(na, blocks)
    await copied([na_far], eu, hot(blocks)[:5])
    link.cut()
    with pytest.raises(TierUnavailable):
        await copied([replace(na_far, read_timeout=0.5)], eu, hot(blocks), patience=0.0)
    link.heal()
    result = await copied([na_far], eu, hot(blocks))
    assert result.outcomes == {Outcome.PRESENT: 5, Outcome.COPIED: 7}


async def test_no_more_is_on_its_way_than_the_window_allows(
    na: ObjectSettings, na_far: ObjectSettings, eu: ObjectSettings, random_source: random.Random
) -> None:
    blocks = chain(random_source, 12)
    store(na, blocks)
    size = blocks[0].header.envelope_bytes
    window = Window(2 * size)
    most = 0

    class Counting:
        async def take(self, nbytes: int) -> bool:
            nonlocal most
            most = max(most, window.used)
            return True

    async with Links.open([na_far]) as far, Links.open([eu]) as near:
        await copy(hot(blocks), Streamed(far, near, Counting(), window))
    assert most == 2 * size
    assert window.used == 0
    assert len(stored(eu)) == 12


class TestWindow:
    def test_grows_while_blocks_are_quick_and_shrinks_while_they_are_slow(self) -> None:
        window = Window(64 << 20)
        first = window.total
        for _ in range(1000):
            window.learn(1 << 20, 0.1)
        assert first < window.total == 64 << 20
        for _ in range(1000):
            window.learn(1 << 20, 10.0)
        assert window.total == 1 << 20, "one block at a time is the least"

    async def test_a_block_larger_than_what_is_left_of_it_goes_alone(self) -> None:
        window = Window(64 << 20)
        large = 8 << 20
        order: list[str] = []

        async def send(name: str, nbytes: int) -> None:
            async with window.taken(nbytes):
                order.append(name)
                await asyncio.sleep(0)

        async with window.taken(window.total):
            waiting = asyncio.create_task(send("large", large))
            await asyncio.sleep(0)
            window.resize(1 << 20)
        await asyncio.wait_for(waiting, 5)
        await asyncio.wait_for(send("small", 1), 5)
        assert order == ["large", "small"]
        assert window.used == 0


async def test_the_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took n bytes waits until all that was taken before has been sent at the rate."""
    monkeypatch.setattr(rate_module, "time", SimpleNamespace(monotonic=lambda: 7.0))
    slept: list[float] = []
    rate = RateLimit(1000)

    async def note(seconds: float) -> None:
        slept.append(seconds)

    original, asyncio.sleep = asyncio.sleep, note  # type: ignore[assignment]
    try:
        for _ in range(5):
            await rate.take(500)
    finally:
        asyncio.sleep = original
    assert slept == pytest.approx([0.5, 1.0, 1.5, 2.0])


async def test_within_one_server_the_server_copies(
    far_server: S3Server, na: ObjectSettings, random_source: random.Random
) -> None:
    mirror = replace(na, url="s3://mirror-" + random.randbytes(5).hex() + "/other")
    Bucket(mirror).create()
    blocks = chain(random_source, 4)
    store(na, blocks)
    overwrite(na, blocks[3], b"x" * blocks[3].header.envelope_bytes)
    with shaped(na.endpoint, Shape()) as link:
        near, far = replace(mirror, endpoint=link.endpoint), replace(na, endpoint=link.endpoint)
        result = Copied()
        async with Links.open([far]) as source, Links.open([near]) as destination:
            await copy(
                hot(blocks), ServerSide(connect(near), source, far, destination, near, RateLimit(None)), result.add
            )
            again = Copied()
            await copy(
                hot(blocks)[:3], ServerSide(connect(near), source, far, destination, near, RateLimit(None)), again.add
            )
        assert result.outcomes == {Outcome.COPIED: 3, Outcome.CORRUPT: 1}
        assert again.outcomes == {Outcome.PRESENT: 3}
        assert stored(mirror) == {b.key: bytes(b.envelope) for b in blocks[:3]}
        assert link.bytes_up < 3 * PAYLOAD_BYTES, "the bytes stay within the server"
