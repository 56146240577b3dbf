"""The contract of ``kvstore.catalog.documents``, as part of the suite of catalogs (``kvstore.testing.catalog``)."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.catalog.base import Catalog
from kvstore.catalog.documents import BEGINNING, MAX_DOCUMENT_BYTES, PAGE, PAGE_BYTES, Mark

LONG = 600.0


class DocumentsConformance:
    """Tests of two connections to one catalog, which subclasses provide as the fixtures ``catalog`` and ``other``."""

    def document_bounds(self) -> list[object]:
        """Modules in which MOST_DOCUMENTS is looked up when a document is written."""
        raise NotImplementedError

    async def test_a_document_is_read_by_others_as_it_was_written(self, catalog: Catalog, other: Catalog) -> None:
        before = time.time()
        revision = await catalog.documents.put("pins/a", b"\x00one\xff", LONG)
        (found,) = (await other.documents.read("pins")).documents
        assert (found.name, found.rest, found.body, found.revision) == ("pins/a", "a", b"\x00one\xff", revision)
        assert before + LONG - 5 < found.expires < time.time() + LONG + 5
        assert (await other.documents.read("jobs")).documents == ()

    async def test_a_reader_is_told_what_is_new_since_its_mark(self, catalog: Catalog, other: Catalog) -> None:
        await catalog.documents.put("pins/a", b"1", LONG)
        await catalog.documents.put("pins/b", b"1", LONG)
        first = await other.documents.read("pins")
        assert [one.name for one in first.documents] == ["pins/a", "pins/b"]
        assert first.restarted
        assert first.caught_up
        idle = await other.documents.read("pins", first.mark)
        assert (idle.documents, idle.restarted, idle.caught_up) == ((), False, True)
        await catalog.documents.put("jobs/x", b"", LONG)
        await catalog.documents.put("pins/a", b"2", LONG)
        news = await other.documents.read("pins", idle.mark)
        assert [(one.name, one.body) for one in news.documents] == [("pins/a", b"2")]
        assert not news.restarted

    async def test_many_documents_come_in_pages_in_the_order_of_their_writing(
        self, catalog: Catalog, other: Catalog
    ) -> None:
        count = 2 * PAGE + 3
        names = [f"pins/{number:03d}" for number in reversed(range(count))]
        revisions = [await catalog.documents.put(name, name.encode(), LONG) for name in names]
        assert all(revisions[i] < revisions[i + 1] for i in range(count - 1))  # type: ignore[operator]
        read: list[str] = []
        mark, caught_up, restarts = BEGINNING, False, 0
        while not caught_up:
            page = await other.documents.read("pins", mark)
            assert len(page.documents) <= PAGE
            read += [one.name for one in page.documents]
            mark, caught_up, restarts = page.mark, page.caught_up, restarts + page.restarted
        assert read == names
        assert restarts == 1
        assert list(await other.documents.read_all("pins")) == names

    async def test_a_write_can_depend_on_what_was_read(self, catalog: Catalog, other: Catalog) -> None:
        first = await catalog.documents.put("pins/a", b"1", LONG, expected=0)
        assert first is not None
        assert await other.documents.put("pins/a", b"2", LONG, expected=0) is None
        assert await other.documents.put("pins/a", b"2", LONG, expected=first + 1) is None
        second = await other.documents.put("pins/a", b"2", LONG, expected=first)
        assert second is not None
        assert second > first
        assert await catalog.documents.put("pins/a", b"3", 0, expected=first) is None
        (found,) = (await catalog.documents.read("pins")).documents
        assert found.body == b"2"

    async def test_of_many_conditional_writes_one_succeeds(self, catalog: Catalog, other: Catalog) -> None:
        wishes = [
            (catalog if i % 2 else other).documents.put("pins/a", str(i).encode(), LONG, expected=0) for i in range(20)
        ]
        assert sum(revision is not None for revision in await asyncio.gather(*wishes)) == 1

    async def test_a_document_can_be_removed(self, catalog: Catalog, other: Catalog) -> None:
        first = await catalog.documents.put("pins/a", b"1", LONG)
        assert first is not None
        removed = await other.documents.put("pins/a", b"", 0)
        assert removed is not None
        assert removed > first
        assert await catalog.documents.read_all("pins") == {}
        assert await catalog.documents.put("pins/a", b"2", LONG, expected=0) is not None
        assert await catalog.documents.put("pins/none", b"", 0) is not None

    async def test_a_document_expires(self, catalog: Catalog, other: Catalog) -> None:
        await catalog.documents.put("nodes/a", b"1", 0.05)
        await catalog.documents.put("nodes/b", b"1", LONG)
        while "nodes/a" in await other.documents.read_all("nodes"):
            await asyncio.sleep(0.02)
        assert list(await catalog.documents.read_all("nodes")) == ["nodes/b"]
        assert await catalog.documents.put("nodes/a", b"2", LONG, expected=0) is not None

    async def test_a_write_prolongs_a_document(self, catalog: Catalog) -> None:
        await catalog.documents.put("nodes/a", b"1", 0.05)
        await catalog.documents.put("nodes/a", b"1", LONG)
        await asyncio.sleep(0.1)
        assert list(await catalog.documents.read_all("nodes")) == ["nodes/a"]

    async def test_documents_outlive_the_index(self, catalog: Catalog, other: Catalog) -> None:
        revision = await catalog.documents.put("pins/a", b"1", LONG)
        mark = (await other.documents.read("pins")).mark
        await catalog.reset()
        page = await other.documents.read("pins", mark)
        assert page.restarted, "a reader need not tell a dropped index from a lost catalog"
        assert [(one.body, one.revision) for one in page.documents] == [(b"1", revision)]

    async def test_a_mark_from_the_future_means_that_writes_were_lost(self, catalog: Catalog) -> None:
        await catalog.documents.put("pins/a", b"1", LONG)
        mark = (await catalog.documents.read("pins")).mark
        page = await catalog.documents.read("pins", Mark(mark.epoch, mark.revision + 1))
        assert page.restarted
        assert [one.name for one in page.documents] == ["pins/a"]

    async def test_a_folder_is_bounded(self, catalog: Catalog, other: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in self.document_bounds():
            monkeypatch.setattr(module, "MOST_DOCUMENTS", 3)
        await catalog.documents.put("jobs/x", b"", LONG)
        for number, seconds in enumerate((LONG, LONG - 100, LONG - 50, LONG - 20)):
            await catalog.documents.put(f"pins/{number}", b"", seconds)
        assert list(await other.documents.read_all("pins")) == ["pins/0", "pins/2", "pins/3"]
        assert list(await other.documents.read_all("jobs")) == ["jobs/x"]

    async def test_a_large_document_is_carried_and_a_larger_one_refused(self, catalog: Catalog) -> None:
        body = bytes(MAX_DOCUMENT_BYTES)
        await catalog.documents.put("hotness/a", body, LONG)
        (found,) = (await catalog.documents.read("hotness")).documents
        assert found.body == body
        with pytest.raises(ValueError, match="bytes"):
            await catalog.documents.put("hotness/a", body + b"x", LONG)

    async def test_an_answer_is_bounded_in_bytes(self, catalog: Catalog, other: Catalog) -> None:
        for number in range(4):
            await catalog.documents.put(f"hotness/{number}", bytes(PAGE_BYTES // 2 + 1), LONG)
        page = await other.documents.read("hotness")
        assert [one.rest for one in page.documents] == ["0", "1"]
        assert not page.caught_up
        rest = await other.documents.read("hotness", page.mark)
        assert [one.rest for one in rest.documents] == ["2", "3"]
        last = await other.documents.read("hotness", rest.mark)
        assert (last.documents, last.caught_up) == ((), True)
        assert len(await catalog.documents.read_all("hotness")) == 4

    @pytest.mark.parametrize("name", ["", "pins", "pins/", "/a", "pins/two words", "a b/c", "pins/" + "x" * 201])
    async def test_names_of_documents_are_checked(self, catalog: Catalog, name: str) -> None:
        with pytest.raises(ValueError, match="folder"):
            await catalog.documents.put(name, b"", LONG)
