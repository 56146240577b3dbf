"""What every catalog must do, as a test suite to subclass.

    class TestMyCatalog(CatalogConformance):
        async def open(self):
            return await MyCatalog.open(self.place)

``open`` is called several times in a test, as several nodes would: all see the same catalog. The suite needs pytest and
pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kvstore.catalog import base
from kvstore.catalog.base import BATCH, START, Batch, Catalog, Changes, Cursor, Entry
from kvstore.envelope import HEADER_BYTES
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.blocks import NAMESPACE, random_key
from kvstore.testing.documents import DocumentsConformance

Index = dict[BlockKey, Entry]


class CatalogConformance(DocumentsConformance):
    """The contract of ``kvstore.catalog.base``. Subclasses must define ``open``."""

    pytestmark = pytest.mark.asyncio

    async def open(self) -> Catalog:
        """One more connection to this test's catalog, which was empty before the first."""
        raise NotImplementedError

    @pytest_asyncio.fixture
    async def catalog(self) -> AsyncIterator[Catalog]:
        catalog = await self.open()
        yield catalog
        await catalog.close()

    @pytest_asyncio.fixture
    async def other(self, catalog: Catalog) -> AsyncIterator[Catalog]:
        other = await self.open()
        yield other
        await other.close()

    @pytest.fixture
    def source(self) -> random.Random:
        return random.Random(1)

    # The index

    async def test_entries_come_back_as_they_were_recorded(
        self, catalog: Catalog, other: Catalog, source: random.Random
    ) -> None:
        entries = random_entries(source, BATCH)
        await catalog.record(entries)
        absent = random_key(source)
        keys = [*list(entries)[: BATCH - 1], absent]
        source.shuffle(keys)
        assert await other.lookup(keys) == [entries.get(key) for key in keys]
        assert await other.lookup([]) == []

    async def test_removed_entries_are_gone(self, catalog: Catalog, source: random.Random) -> None:
        entries = random_entries(source, 10)
        await catalog.record(entries)
        gone, *rest = entries
        await catalog.record({gone: None, random_key(source): None})
        assert await catalog.lookup([gone, *rest]) == [None, *(entries[key] for key in rest)]

    async def test_totals_follow_every_change(self, catalog: Catalog, source: random.Random) -> None:
        entries = random_entries(source, 20)
        first, second, *_ = entries
        longer = entries[first]._replace(length=entries[first].length + 100_000)
        await catalog.record(entries)
        await catalog.record(entries)
        await catalog.record({first: longer, second: None})
        entries[first] = longer
        del entries[second]
        status = await catalog.status()
        assert status.blocks == len(entries)
        assert status.used_bytes == sum(entry.envelope_bytes for entry in entries.values())
        assert status.changes == 22, "what changes nothing is no change"

    async def test_what_a_listing_tells_does_not_replace_what_a_header_told(
        self, catalog: Catalog, source: random.Random
    ) -> None:
        (entry,) = random_entries(source, 1).values()
        padded = entry.envelope_bytes - HEADER_BYTES
        size_only = entry._replace(parent=NO_PARENT, depth=0, tokens=0, length=padded)
        for known in (size_only, entry, size_only, entry._replace(stored=entry.stored + 1)):
            await catalog.record({entry.key: known})
        assert await catalog.lookup([entry.key]) == [entry]
        assert (await catalog.status()).changes == 2
        for other in (
            size_only._replace(length=padded + HEADER_BYTES),
            entry._replace(length=entry.length - 1),
            entry._replace(namespace=b"another name..."[:15] + b"."),
        ):
            await catalog.record({entry.key: other})
            assert await catalog.lookup([entry.key]) == [other]

    async def test_what_cannot_be_an_entry_is_absent_until_it_is_recorded_again(
        self, catalog: Catalog, source: random.Random
    ) -> None:
        entries = random_entries(source, 8)
        await catalog.record(entries)
        good = next(iter(entries.values())).pack()
        nonsense = [b"", b"x", good[:-1], good + b"x", bytes(4) + good[4:], b"\xff" * 4 + good[4:]]
        for key, value in zip(entries, nonsense, strict=False):
            if not await self.damage(catalog, key, value):
                pytest.skip("this catalog cannot be damaged")
        keys = list(entries)
        sound = {key: entries[key] for key in keys[len(nonsense) :]}
        assert await catalog.lookup(keys) == [sound.get(key) for key in keys]
        index: Index = {}
        await follow(catalog, START, index)
        assert index == sound
        await catalog.record(entries)
        assert await catalog.lookup(keys) == list(entries.values())
        await catalog.record(dict.fromkeys(keys))
        assert (await catalog.status()).blocks == 0

    async def damage(self, catalog: Catalog, key: BlockKey, value: bytes) -> bool:
        """Replace the packed entry of a key behind the catalog's back. False: that cannot be done."""
        return False

    # Following

    async def test_a_follower_sees_the_index_and_then_every_change(
        self, catalog: Catalog, other: Catalog, source: random.Random
    ) -> None:
        entries = random_entries(source, 1200)
        for some in parts(entries):
            await catalog.record(some)
        index: Index = {}
        cursor = await follow(other, START, index, limit=100)
        assert index == entries
        more = random_entries(source, 700)
        gone = list(entries)[:300]
        for some in parts({**more, **dict.fromkeys(gone)}):
            await catalog.record(some)
        await follow(other, cursor, index, limit=100)
        assert index == {key: entry for key, entry in {**entries, **more}.items() if key not in gone}

    async def test_changes_come_in_order(self, catalog: Catalog, source: random.Random) -> None:
        index: Index = {}
        cursor = await follow(catalog, START, index)
        one, two = random_entries(source, 2).values()
        await catalog.record({one.key: one})
        await catalog.record({two.key: two})
        await catalog.record({one.key: None})
        await catalog.record({one.key: one})
        batch = await catalog.follow(cursor)
        assert list(batch.changes.items()) == [(two.key, two), (one.key, one)]
        assert batch.caught_up
        assert not batch.restarted

    async def test_changes_made_while_the_index_is_read_are_not_missed(
        self, catalog: Catalog, other: Catalog, source: random.Random
    ) -> None:
        truth = random_entries(source, 2000)
        for some in parts(truth):
            await catalog.record(some)
        index: Index = {}
        cursor, caught_up = START, False
        while not caught_up:
            batch = await other.follow(cursor, 100)
            apply(index, batch)
            cursor, caught_up = batch.cursor, batch.caught_up
            if len(truth) < 3000:
                gone = source.sample(sorted(truth), 20)
                new = random_entries(source, 120)
                await catalog.record({**dict.fromkeys(gone), **new})
                truth = {key: entry for key, entry in {**truth, **new}.items() if key not in gone}
        assert index == truth

    async def test_a_follower_that_was_away_too_long_starts_again(
        self, catalog: Catalog, source: random.Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in self.bounded_modules():
            monkeypatch.setattr(module, "CHANGES_KEPT", 200)
        old, new = random_entries(source, 50), random_entries(source, 1500)
        await catalog.record(old)
        index: Index = {}
        cursor = await follow(catalog, START, index)
        await catalog.record(dict.fromkeys(old))
        for some in parts(new):
            await catalog.record(some)
        batch = await catalog.follow(cursor)
        assert batch.restarted
        seen: Index = {}
        apply(seen, batch)
        await follow(catalog, batch.cursor, seen)
        assert seen == new

    def bounded_modules(self) -> list[object]:
        """Modules in which CHANGES_KEPT is looked up when changes are recorded."""
        return [base]

    def document_bounds(self) -> list[object]:
        return self.bounded_modules()

    # Epochs

    async def test_a_new_catalog_is_not_complete(self, catalog: Catalog, other: Catalog) -> None:
        status = await catalog.status()
        assert not status.complete
        assert not (await catalog.follow(START)).complete
        assert await catalog.complete(status.epoch)
        assert (await other.status()).complete
        assert (await other.follow(START)).complete

    async def test_reset_drops_the_index_and_sends_followers_to_its_start(
        self, catalog: Catalog, other: Catalog, source: random.Random
    ) -> None:
        await catalog.record(random_entries(source, 10))
        cursor = await follow(other, START, {})
        before = (await catalog.status()).epoch
        await catalog.complete(before)
        epoch = await catalog.reset()
        status = await other.status()
        assert (status.epoch, status.complete, status.blocks, status.used_bytes) == (epoch, False, 0, 0)
        assert epoch != before
        assert not await catalog.complete(before)
        batch = await other.follow(cursor)
        assert batch.restarted
        assert batch.caught_up
        assert not batch.changes

    async def test_a_cursor_from_the_future_means_that_changes_were_lost(
        self, catalog: Catalog, source: random.Random
    ) -> None:
        entries = random_entries(source, 3)
        await catalog.record(entries)
        cursor = await follow(catalog, START, {})
        await catalog.complete(cursor.epoch)
        batch = await catalog.follow(dataclasses.replace(cursor, since=cursor.since + 1))
        assert batch.restarted
        assert not batch.complete
        assert batch.cursor.epoch != cursor.epoch
        assert dict(batch.changes) == entries

    # Claims

    async def test_a_claim_has_one_holder(self, catalog: Catalog, other: Catalog) -> None:
        mine = await catalog.claim("role/evictor", "a", 30)
        assert mine is not None
        assert (mine.name, mine.holder) == ("role/evictor", "a")
        assert await other.claim("role/evictor", "b", 30) is None
        renewed = await catalog.claim("role/evictor", "a", 60)
        assert renewed is not None
        assert renewed.token == mine.token
        assert renewed.expires > mine.expires
        assert await other.claim("role/rebuild", "b", 30) is not None
        assert [(c.name, c.holder) for c in (await other.status()).claims] == [
            ("role/evictor", "a"),
            ("role/rebuild", "b"),
        ]

    async def test_a_claim_that_was_given_back_is_free(self, catalog: Catalog, other: Catalog) -> None:
        mine = await catalog.claim("role", "a", 30)
        assert await other.claim("role", "b", 0) is None
        assert await other.claim("role", "b", 30) is None, "only the holder can give it back"
        assert await catalog.claim("role", "a", 0) is None
        theirs = await other.claim("role", "b", 30)
        assert mine is not None
        assert theirs is not None
        assert theirs.token > mine.token

    async def test_a_claim_expires(self, catalog: Catalog, other: Catalog) -> None:
        mine = await catalog.claim("role", "a", 0.05)
        assert mine is not None
        theirs = None
        while theirs is None:
            await asyncio.sleep(0.01)
            theirs = await other.claim("role", "b", 30)
        assert theirs.token > mine.token
        assert await catalog.claim("role", "a", 30) is None

    async def test_claims_outlive_the_index(self, catalog: Catalog, other: Catalog) -> None:
        mine = await catalog.claim("role", "a", 30)
        await catalog.reset()
        assert await other.claim("role", "b", 30) is None
        renewed = await catalog.claim("role", "a", 30)
        assert mine is not None
        assert renewed is not None
        assert renewed.token == mine.token

    async def test_of_many_who_want_a_claim_one_gets_it(self, catalog: Catalog, other: Catalog) -> None:
        wishes = [(catalog if i % 2 else other).claim("role", f"node-{i}", 30) for i in range(20)]
        assert sum(claim is not None for claim in await asyncio.gather(*wishes)) == 1

    @pytest.mark.parametrize("name", ["", "two words", "new\nline", "x" * 201])
    async def test_names_are_checked(self, catalog: Catalog, name: str) -> None:
        with pytest.raises(ValueError, match="letters, digits"):
            await catalog.claim(name, "a", 30)
        with pytest.raises(ValueError, match="letters, digits"):
            await catalog.claim("role", name, 30)

    # Concurrency and life cycle

    async def test_concurrent_writers_lose_nothing(
        self, catalog: Catalog, other: Catalog, source: random.Random
    ) -> None:
        groups = [random_entries(source, 60) for _ in range(10)]
        await asyncio.gather(*((catalog if i % 2 else other).record(group) for i, group in enumerate(groups)))
        index: Index = {}
        await follow(catalog, START, index)
        assert index == {key: entry for group in groups for key, entry in group.items()}

    async def test_a_cancelled_call_ends_as_cancelled(self, catalog: Catalog, source: random.Random) -> None:
        keys = list(random_entries(source, 3))
        for turns in range(100):
            call = asyncio.ensure_future(catalog.lookup(keys))
            for _ in range(turns % 25):
                await asyncio.sleep(0)
            cancelled = call.cancel()
            await asyncio.wait([call])
            assert call.cancelled() is cancelled
        assert await catalog.lookup(keys) == [None] * 3

    async def test_what_was_recorded_outlives_the_connection(self, catalog: Catalog, source: random.Random) -> None:
        entries = random_entries(source, 5)
        await catalog.record(entries)
        await catalog.close()
        again = await self.open()
        try:
            assert await again.lookup(list(entries)) == list(entries.values())
        finally:
            await again.close()

    async def test_closing_twice_does_no_harm(self, catalog: Catalog) -> None:
        await catalog.close()
        await catalog.close()


def random_entries(source: random.Random, count: int) -> Index:
    """Distinct blocks with everything known of them."""
    entries = [
        Entry(
            key=random_key(source),
            namespace=NAMESPACE,
            parent=random_key(source),
            depth=source.randrange(2048),
            tokens=64,
            length=source.randrange(2, 32 << 20),
            stored=1_700_000_000 + source.randrange(1_000_000),
        )
        for _ in range(count)
    ]
    return {entry.key: entry for entry in entries}


def parts(changes: Changes) -> list[Changes]:
    """Changes in pieces that one ``record`` takes."""
    items = list(changes.items())
    return [dict(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]


def apply(index: Index, batch: Batch) -> None:
    """Bring a follower's index up to date."""
    if batch.restarted:
        index.clear()
    for key, entry in batch.changes.items():
        if entry is None:
            index.pop(key, None)
        else:
            index[key] = entry


async def follow(catalog: Catalog, cursor: Cursor, index: Index, limit: int = BATCH) -> Cursor:
    """Follow until there is nothing more."""
    while True:
        batch = await catalog.follow(cursor, limit)
        apply(index, batch)
        cursor = batch.cursor
        if batch.caught_up:
            return cursor
