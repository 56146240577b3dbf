"""What a region keeps no longer: decisions as tables, and the rounds that carry them out."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from region_cases import LLAMA, chain, store, stored
from region_pair import Pair

from kvstore.catalog.base import Entry
from kvstore.errors import ConfigError, ProtocolError, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.testing.blocks import SealedBlock
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import block_name
from replication.contents import Contents
from replication.links import Links
from replication.planner import LeftOut
from replication.retention import Decision, Reason, Retired, Uses, decide, observe, remember
from replication.retiring import read_retired, retire, write_retired
from replication.topology import Retention

DAY = 86_400
NOW = 100.0 * DAY
NEWER = replace(LLAMA, weights="2")
TUNED = replace(LLAMA, weights="2", lora="x")
NAMES = {one.digest: one for one in (LLAMA, NEWER, TUNED)}
MONTH = Retention(ttl=30.0 * DAY)
REVISIONS = Retention(retire_old_revisions=True, grace=3600.0)


def entry(name: int, days_ago: float, parent: Entry | None = None, namespace: Namespace = LLAMA) -> Entry:
    depth, above = (0, NO_PARENT) if parent is None else (parent.depth + 1, parent.key)
    return Entry(BlockKey(bytes([name]) * 16), 5000, namespace.digest, 16, depth, above, int(NOW - days_ago * DAY))


def index(*entries: Entry) -> dict[BlockKey, Entry]:
    return {one.key: one for one in entries}


def used(days_ago: float, *entries: Entry) -> HotnessSnapshot:
    """A node that reports now."""
    keys = [one.key for one in entries]
    return HotnessSnapshot(NOW, 3600.0, dict.fromkeys(keys, 1.0), dict.fromkeys(keys, NOW - days_ago * DAY))


def decided(
    blocks: dict[BlockKey, Entry],
    *rules: Retention,
    reports: list[HotnessSnapshot] | None = None,
    retired: Retired | None = None,
    uses: Uses | None = None,
) -> tuple[Decision, Retired]:
    reports = [HotnessSnapshot(NOW, 3600.0, {})] if reports is None else reports
    seen, left = observe(blocks, reports, uses or Uses(), retired or Retired(), NOW)
    heard = max((report.taken for report in reports), default=0.0)
    return decide(blocks, NAMES, rules, seen, heard, NOW), left


def retired_of(decision: Decision) -> dict[BlockKey, Reason]:
    return {one.key: reason for one, reason in decision.blocks}


class TestTTL:
    def test_counts_from_creation_where_no_use_is_known(self) -> None:
        old, new = entry(1, 31), entry(2, 29)
        decision, _ = decided(index(old, new), MONTH)
        assert retired_of(decision) == {old.key: Reason.TTL}

    def test_a_use_keeps_a_block_and_all_before_it_in_its_chain(self) -> None:
        head = entry(1, 90)
        middle = entry(2, 90, head)
        tail = entry(3, 90, middle)
        decision, _ = decided(index(head, middle, tail), MONTH, reports=[used(1, middle)])
        assert retired_of(decision) == {tail.key: Reason.TTL}

    def test_tails_go_first(self) -> None:
        head = entry(1, 90)
        tail = entry(2, 80, head)
        decision, _ = decided(index(head, tail), MONTH)
        assert [one for one, _ in decision.blocks] == [tail, head]

    def test_only_models_and_tenants_of_the_rule_and_the_strictest_holds(self) -> None:
        old = entry(1, 10)
        assert not decided(index(old), Retention(models=("qwen*",), ttl=DAY))[0].blocks
        assert not decided(index(old), Retention(tenants=("t-*",), ttl=DAY))[0].blocks
        assert decided(index(old), MONTH, Retention(models=("ll*",), ttl=9.0 * DAY))[0].blocks

    def test_a_block_of_no_known_namespace_is_kept(self) -> None:
        stranger = entry(1, 900)._replace(namespace=b"?" * 16)
        assert not decided(index(stranger), MONTH, REVISIONS)[0].blocks

    def test_uses_are_remembered_after_nodes_stop_to_report_them(self) -> None:
        block = entry(1, 90)
        uses, _ = observe(index(block), [used(1, block)], Uses(), Retired(), NOW)
        assert not decided(index(block), MONTH, uses=uses)[0].blocks
        assert observe({}, [], uses, Retired(), NOW)[0].last == {}, "but not longer than the block is there"


class TestRevisions:
    def test_the_old_one_goes_once_the_newer_one_serves(self) -> None:
        old, new = entry(1, 20), entry(2, 1, namespace=NEWER)
        decision, _ = decided(index(old, new), REVISIONS)
        assert retired_of(decision) == {old.key: Reason.REVISION}
        assert set(decision.namespaces) == {LLAMA.digest}

    @pytest.mark.parametrize("case", ["used", "stored", "too new", "nobody reports", "reports are old", "off"])
    def test_it_stays_while(self, case: str) -> None:
        old, new = entry(1, 20), entry(2, 1, namespace=NEWER)
        blocks, reports, rule = index(old, new), [used(20, old)], REVISIONS
        if case == "used":
            reports = [used(0.5 / 24, old)]
        elif case == "stored":
            blocks |= index(entry(3, 0.5 / 24, old))
        elif case == "too new":
            blocks = index(old, entry(2, 0.5 / 24, namespace=NEWER))
        elif case == "nobody reports":
            reports = []
        elif case == "reports are old":
            reports = [replace(reports[0], taken=NOW - 3700)]
        elif case == "off":
            rule = MONTH
        assert not decided(blocks, rule, reports=reports)[0].blocks

    def test_after_a_rollback_the_one_in_use_stays(self) -> None:
        """The revision that was first seen later is the newer one, whichever was stored to last."""
        old, new = entry(1, 20), entry(2, 10, namespace=NEWER)
        again = entry(3, 0.01, old)
        decision, _ = decided(index(old, again, new), REVISIONS, reports=[used(0, old)])
        assert not decision.blocks

    def test_another_adapter_or_type_is_no_revision(self) -> None:
        old, tuned = entry(1, 20), entry(2, 1, namespace=TUNED)
        assert not decided(index(old, tuned), REVISIONS)[0].blocks


class TestMemory:
    def test_what_is_there_again_was_used(self) -> None:
        block = entry(1, 90)
        decision, left = decided(index(block), MONTH, retired=Retired({block.key: int(NOW - DAY)}))
        assert not decision.blocks
        assert left.blocks == {}

    def test_an_old_revision_that_serves_again_is_retired_no_more(self) -> None:
        retired = Retired(namespaces={LLAMA.digest: int(NOW - DAY)})
        _, left = decided(index(entry(1, 0.5)), REVISIONS, retired=retired)
        assert left.namespaces == {}
        _, left = decided({}, REVISIONS, retired=retired)
        assert left.namespaces == retired.namespaces

    def test_what_no_manifest_lists_is_forgotten_after_a_while(self) -> None:
        listed, loose, recent = (entry(name, 90).key for name in (1, 2, 3))
        at = {listed: int(NOW - 30 * DAY), loose: int(NOW - 30 * DAY), recent: int(NOW - DAY)}
        assert remember(Retired(at), Decision(()), {listed}, NOW).blocks.keys() == {listed, recent}

    @given(st.data())
    def test_chains_have_no_holes_afterwards(self, data: st.DataObject) -> None:
        blocks: list[Entry] = []
        for number in range(data.draw(st.integers(1, 15))):
            parent = data.draw(st.sampled_from([None, *blocks]))
            namespace = data.draw(st.sampled_from([LLAMA, NEWER])) if parent is None else NAMES[parent.namespace]
            blocks.append(entry(number + 1, data.draw(st.floats(0, 60)), parent, namespace))
        reports = [used(data.draw(st.floats(0, 60)), *data.draw(st.lists(st.sampled_from(blocks))))]
        decision, _ = decided(index(*blocks), MONTH, REVISIONS, reports=reports)
        left = index(*blocks).keys() - retired_of(decision).keys()
        assert all(one.parent == NO_PARENT or one.parent in left for one in blocks if one.key in left)


class TestRounds:
    """In a real bucket."""

    @pytest_asyncio.fixture
    async def bucket(self, tmp_path: Path) -> AsyncIterator[Links]:
        async with Links.open([ObjectSettings(url=f"file://{tmp_path}/bucket")]) as links:
            yield links

    async def test_observe_deletes_nothing_and_enforce_does(self, bucket: Links, tmp_path: Path) -> None:
        place = ObjectSettings(url=f"file://{tmp_path}/bucket")
        blocks = chain(random.Random(1), 3)
        store(place, blocks)
        contents, rules = Contents(bucket), [Retention(ttl=60.0)]
        assert not (await retire(contents, rules, enforce=True)).blocks, "all of it is new"
        aged(place, blocks)
        report = await retire(contents, rules, enforce=False)
        assert dict(report.blocks) == {("llama", "default", "ttl"): 3}
        assert report.nbytes == sum(block.header.envelope_bytes for block in blocks)
        assert len(stored(place)) == 3
        await retire(contents, rules, enforce=True)
        assert stored(place) == {}
        assert (await read_retired(bucket)).blocks.keys() == {block.key for block in blocks}

    async def test_what_could_not_be_deleted_is_not_taken_for_used(
        self, bucket: Links, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = ObjectSettings(url=f"file://{tmp_path}/bucket")
        blocks = chain(random.Random(1), 2)
        store(place, blocks)
        aged(place, blocks)
        contents, rules = Contents(bucket), [Retention(ttl=60.0)]

        async def away(names: object) -> None:
            raise TierUnavailable("away")

        with monkeypatch.context() as patch:
            patch.setattr(bucket, "delete", away)
            with pytest.raises(TierUnavailable):
                await retire(contents, rules, enforce=True)
        assert (await retire(contents, rules, enforce=True)).blocks.total() == 2

    @pytest.mark.parametrize("junk", [b"", b"\x93", b"\x93\xc4\x01a\xc4\x00\x80", b"x" * 100])
    async def test_a_memory_that_cannot_be_read_is_empty(self, bucket: Links, junk: bytes) -> None:
        await bucket.put("retention/retired.msgpack", junk, create=False)
        assert await read_retired(bucket) == Retired()


def aged(place: ObjectSettings, blocks: list[SealedBlock]) -> None:
    """Make a folder's objects a day old."""
    assert place.folder is not None
    for block in blocks:
        os.utime(place.folder / block_name(block.header.namespace, block.key), (time.time() - DAY,) * 2)


@pytest.mark.s3
async def test_what_was_retired_does_not_come_back_with_a_manifest(pair: Pair, random_source: random.Random) -> None:
    blocks = chain(random_source, 4)
    store(pair.na, blocks)
    await pair.publish()
    await pair.cycle(pair.write())
    tail = blocks[2:]
    async with Links.open([pair.eu]) as bucket:
        decision = Decision([(Entry.of(block.header), Reason.TTL) for block in reversed(tail)])
        await write_retired(bucket, remember(Retired(), decision, set(), time.time()))
        await Contents(bucket).delete(one for one, _ in decision.blocks)
    await pair.publish()
    cycle = await pair.cycle(pair.write())
    assert cycle.flows[0].plan.left_out[LeftOut.TOMBSTONE].blocks == 2
    assert stored(pair.eu).keys() == {block.key for block in blocks[:2]}


class TestReports:
    """What nodes say of uses."""

    def test_uses_survive_the_wire(self) -> None:
        keys = [BlockKey(bytes([n]) * 16) for n in range(3)]
        snapshot = HotnessSnapshot(5.0, 60.0, {keys[0]: 2.0, keys[1]: 1.0}, {keys[0]: 1e9, keys[2]: 2e9})
        again = HotnessSnapshot.unpack(snapshot.pack())
        assert again.used == {keys[0]: 1e9}, "of what is named"
        assert again.scores == snapshot.scores

    def test_the_later_use_counts(self) -> None:
        a, b = BlockKey(b"a" * 16), BlockKey(b"b" * 16)
        one = HotnessSnapshot(5.0, 60.0, {a: 1.0}, {a: 10.0})
        other = HotnessSnapshot(5.0, 60.0, {a: 9.0, b: 2.0}, {a: 30.0, b: 3.0})
        merged = one.with_more(other)
        assert merged.scores == {a: 1.0, b: 2.0}
        assert merged.used == {a: 30.0, b: 3.0}

    def test_another_version_is_refused(self) -> None:
        with pytest.raises(ProtocolError, match="version 1"):
            HotnessSnapshot.unpack(msgpack.packb([1, 5.0, 60.0, b"", b""]))


class TestFile:
    def test_durations_and_rules(self, pair: Pair) -> None:
        rules = '[[retention]]\nmodels = ["llama*"]\nttl = "30d"\nretire_old_revisions = true\ngrace = "2h"\n'
        (rule,) = pair.write(rules=rules).retention
        assert (rule.ttl, rule.grace, rule.retire_old_revisions) == (30 * DAY, 7200, True)

    @pytest.mark.parametrize(
        ("rule", "problem"),
        [
            ("ttl = '30 moons'", "not a duration"),
            ("ttl = '1s'", "greater than or equal to 60"),
            ("tenants = ['x']", "does nothing"),
            ("retire_old_revisions = true\ngrace = '1min'", "greater than or equal to 180"),
        ],
    )
    def test_what_cannot_be_is_refused(self, pair: Pair, rule: str, problem: str) -> None:
        with pytest.raises(ConfigError, match=problem):
            pair.write(rules=f"[[retention]]\n{rule}\n")
