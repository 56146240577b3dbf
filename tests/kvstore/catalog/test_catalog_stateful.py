"""Catalogs against a model: a dict, and followers that were away for any while."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvstore.catalog import open_catalog
from kvstore.catalog.base import START, Catalog, Entry
from kvstore.catalog.documents import BEGINNING
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.catalog import Index, apply
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.testing.servers import ServerUnavailable

KEYS = [BlockKey(bytes([number]) * 16) for number in range(12)]
NAMESPACES = [b"n" * 16, b"m" * 16]
HOLDERS = ["a", "b", "c"]
NAMES = ["pins/a", "pins/b", "jobs/a"]

keys = st.sampled_from(KEYS)
known = st.tuples(
    keys, st.sampled_from(NAMESPACES), st.integers(1, 3), st.integers(4000, 4200), st.booleans(), st.integers(0, 9)
)


def entry(drawn: tuple[BlockKey, bytes, int, int, bool, int]) -> Entry:
    key, namespace, index, length, size_only, stored = drawn
    if size_only:
        return Entry(key=key, namespace=namespace, parent=NO_PARENT, depth=0, tokens=0, length=4096, stored=stored)
    parent = KEYS[index]
    return Entry(key=key, namespace=namespace, parent=parent, depth=index, tokens=64, length=length, stored=stored)


def says_more(new: Entry, old: Entry | None) -> bool:
    """Whether recording ``new`` over ``old`` is a change."""
    if old is None or old.namespace != new.namespace:
        return True
    if new.tokens:
        return new != old._replace(stored=new.stored)
    return new.envelope_bytes != old.envelope_bytes


class CatalogMachine(RuleBasedStateMachine):
    """Records, removals, resets, claims and documents of a catalog, with readers that look now and then."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.catalog: Catalog = self.do(open_catalog(self.url, uuid.uuid4().hex))
        self.model: Index = {}
        self.followers: list[tuple[Any, Index]] = [(START, {}), (START, {})]
        self.held: dict[str, tuple[str, int]] = {}
        self.tokens = 0
        self.documents: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.reader: tuple[Any, dict[str, bytes]] = (BEGINNING, {})

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.do(self.catalog.close())
        self.loop.close()

    @rule(entries=st.lists(known, max_size=8), gone=st.lists(keys, max_size=4))
    def record(self, entries: list[Any], gone: list[BlockKey]) -> None:
        changes: dict[BlockKey, Entry | None] = {e.key: e for e in map(entry, entries)}
        changes.update(dict.fromkeys(gone))
        self.do(self.catalog.record(changes))
        for key, new in changes.items():
            if new is None:
                self.model.pop(key, None)
            elif says_more(new, self.model.get(key)):
                self.model[key] = new

    @rule(follower=st.integers(0, 1), limit=st.integers(1, 5), calls=st.integers(1, 6))
    def read_on(self, follower: int, limit: int, calls: int) -> None:
        cursor, index = self.followers[follower]
        for _ in range(calls):
            batch = self.do(self.catalog.follow(cursor, limit))
            apply(index, batch)
            cursor = batch.cursor
            if batch.caught_up:
                assert index == self.model
        self.followers[follower] = cursor, index

    @rule(asked=st.lists(keys))
    def lookup(self, asked: list[BlockKey]) -> None:
        assert self.do(self.catalog.lookup(asked)) == [self.model.get(key) for key in asked]

    @precondition(lambda self: self.model)
    @rule()
    def reset(self) -> None:
        epoch = self.do(self.catalog.reset())
        self.model.clear()
        assert self.do(self.catalog.complete(epoch))

    @rule(name=st.sampled_from(["x", "y"]), holder=st.sampled_from(HOLDERS), back=st.booleans())
    def claim(self, name: str, holder: str, back: bool) -> None:
        claim = self.do(self.catalog.claim(name, holder, 0 if back else 3600))
        owner, token = self.held.get(name, (holder, 0))
        if owner != holder:
            assert claim is None
        elif back:
            assert claim is None
            self.held.pop(name, None)
        else:
            assert claim is not None
            assert claim.token == token if token else claim.token > self.tokens
            self.tokens = max(self.tokens, claim.token)
            self.held[name] = holder, claim.token

    @rule(
        name=st.sampled_from(NAMES),
        body=st.binary(max_size=4),
        remove=st.booleans(),
        expected=st.sampled_from(["any", "none", "known", "stale"]),
    )
    def put_document(self, name: str, body: bytes, remove: bool, expected: str) -> None:
        known = self.documents.get(name, (b"", 0))[1]
        wanted = {"any": None, "none": 0, "known": known, "stale": self.revision + 1}[expected]
        revision = self.do(self.catalog.documents.put(name, body, 0 if remove else 3600, wanted))
        if wanted not in (None, known):
            assert revision is None
            return
        assert revision > self.revision
        self.revision = revision
        if remove:
            self.documents.pop(name, None)
        else:
            self.documents[name] = body, revision

    @rule()
    def read_documents(self) -> None:
        mark, seen = self.reader
        page = self.do(self.catalog.documents.read("pins", mark))
        if page.restarted:
            seen.clear()
        seen.update((one.name, one.body) for one in page.documents)
        living = {name: body for name, (body, _) in self.documents.items() if name.startswith("pins/")}
        assert page.caught_up
        assert {name: seen[name] for name in living} == living
        self.reader = page.mark, seen

    @invariant()
    def documents_are_as_written(self) -> None:
        for folder in ("pins", "jobs"):
            found = self.do(self.catalog.documents.read_all(folder))
            known = {name: one for name, one in self.documents.items() if name.startswith(folder)}
            assert {name: (one.body, one.revision) for name, one in found.items()} == known
            assert list(found) == sorted(known, key=lambda name: known[name][1])

    @invariant()
    def totals_are_right(self) -> None:
        status = self.do(self.catalog.status())
        assert status.blocks == len(self.model)
        assert status.used_bytes == sum(entry.envelope_bytes for entry in self.model.values())
        assert {claim.name: (claim.holder, claim.token) for claim in status.claims} == self.held


EXAMPLES = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck))


def test_sqlite_behaves_like_a_dict() -> None:
    with tempfile.TemporaryDirectory() as folder:

        class Machine(CatalogMachine):
            @property
            def url(self) -> str:  # type: ignore[override]
                return f"sqlite://{folder}/{uuid.uuid4().hex}.db"

        run_state_machine_as_test(Machine, settings=EXAMPLES)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server(append_only=False))
        except ServerUnavailable as error:
            pytest.skip(str(error))
        yield server


def test_redis_behaves_like_a_dict(redis: RedisServer) -> None:
    machine = type("Machine", (CatalogMachine,), {"url": redis.url})
    run_state_machine_as_test(machine, settings=EXAMPLES)
