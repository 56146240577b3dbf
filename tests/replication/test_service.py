"""The regional service: duties by lease, in spite of everything; the commands that run it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from region_cases import KEY, LLAMA, chain, store, stored
from region_pair import Pair
from typer.testing import CliRunner

from kvstore import burials
from kvstore.catalog import open_catalog
from kvstore.catalog.base import Entry
from kvstore.cli import app
from kvstore.config import load
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.blocks import random_chain
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.object import ObjectSettings
from kvstore.tombstones import Tombstone, end_of_second
from replication import duties, lease
from replication.contents import Contents
from replication.duties import Duty, DutyMetrics, Keeper, Round, read_standing
from replication.evictor import make_room, overflow, victims
from replication.links import Links
from replication.manifest import HotBlock
from replication.publisher import entomb
from replication.service import Pace, serve
from replication.site import Site
from replication.topology import load_topology

QUICK = Pace(publish=0.1, replicate=0.1, evict=0.1)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(site: Site, key: object = None, pace: Pace = QUICK) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(site, key, stop, CollectorRegistry(), pace))  # type: ignore[arg-type]
    try:
        yield
    finally:
        stop.set()
        await task


@pytest.fixture
def folder_bucket(tmp_path: Path) -> ObjectSettings:
    return ObjectSettings(url=f"file://{tmp_path}/bucket")


def site_of(pair: Pair, region: str, *overrides: str) -> Site:
    return Site(load(None, list(overrides), environ={}).config, pair.write(), region)


class TestKeeper:
    """One duty in one process."""

    async def test_rounds_go_on_after_failures_and_are_counted(
        self, folder_bucket: ObjectSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(duties, "FIRST_RETRY_SECONDS", 0.01)
        outcomes: list[Round | Exception] = [
            TierUnavailable("the bucket is away"),
            Round("one"),
            RuntimeError("a bug"),
            Round("", problem="na: half of it"),
        ]
        done = asyncio.Event()

        async def work() -> Round:
            if not outcomes:
                done.set()
                await asyncio.sleep(3600)
            outcome = outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        registry = CollectorRegistry()
        async with Links.open([folder_bucket]) as bucket:
            keeper = Keeper(bucket, Duty("tester", 0.01, work), DutyMetrics(registry))
            task = asyncio.create_task(keeper.run())
            await asyncio.wait_for(done.wait(), 30)
            standing = await read_standing(bucket, "tester")
            task.cancel()
            await asyncio.wait([task])
            assert standing is not None
            assert (standing.rounds, standing.failures, standing.did) == (4, 2, "one")
            assert standing.problem == "na: half of it"
            grant = await lease.current(bucket, "tester")
            assert grant is not None
            assert grant.expires < time.time(), "given back"
        counted = {
            outcome: registry.get_sample_value("kvstore_region_rounds_total", {"duty": "tester", "outcome": outcome})
            for outcome in ("failed", "partly")
        }
        assert counted == {"failed": 2, "partly": 1}

    async def test_one_of_two_replicas_works_and_the_other_takes_over(
        self, folder_bucket: ObjectSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(duties, "STANDBY_SECONDS", 0.05)
        worked: list[str] = []

        def work(name: str) -> Callable[[], Awaitable[Round]]:
            async def once() -> Round:
                worked.append(name)
                return Round(name)

            return once

        async with Links.open([folder_bucket]) as bucket:
            metrics = DutyMetrics(CollectorRegistry())
            tasks = {}
            for name in ("a", "b"):
                tasks[name] = asyncio.create_task(Keeper(bucket, Duty("tester", 0.01, work(name)), metrics).run())
                await eventually(lambda: _true(bool(worked)))
            await asyncio.sleep(0.2)
            assert set(worked) == {"a"}
            tasks["a"].cancel()
            await asyncio.wait([tasks["a"]])
            worked.clear()
            await eventually(lambda: _true(len(worked) > 2))
            assert set(worked) == {"b"}
            tasks["b"].cancel()
            await asyncio.wait([tasks["b"]])


async def _true(value: bool) -> bool:
    return value


@pytest.mark.s3
class TestService:
    async def test_two_regions_by_their_services_alone(
        self, pair: Pair, tmp_path: Path, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 6)
        store(pair.na, blocks)
        url = f"sqlite://{tmp_path}/eu.db"
        eu = site_of(pair, "eu", f"object.url={pair.eu.url}", f"catalog.url={url}")
        async with serving(site_of(pair, "na"), KEY), serving(eu):

            async def arrived() -> bool:
                return stored(pair.eu).keys() == {block.key for block in blocks}

            await eventually(arrived)
            catalog = await open_catalog(url, pair.eu.url)
            try:

                async def recorded() -> bool:
                    return None not in await catalog.lookup([block.key for block in blocks])

                await eventually(recorded)
                entries = await catalog.lookup([block.key for block in blocks])
            finally:
                await catalog.close()
        expected = [Entry.of(block.header)._replace(tokens=LLAMA.block_tokens) for block in blocks]
        assert entries == expected, "with their places in the chain, so that nodes need not read them"

    async def test_a_source_that_is_away_ends_nothing(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 3)
        store(pair.na, blocks)
        await pair.publish()
        pair.link.cut()
        async with serving(site_of(pair, "eu")), Links.open([pair.eu]) as bucket:

            async def noticed() -> bool:
                standing = await read_standing(bucket, "replicator")
                return standing is not None and "na" in standing.problem

            await eventually(noticed)
            pair.link.heal()

            async def arrived() -> bool:
                return len(stored(pair.eu)) == 3

            await eventually(arrived)

    async def test_a_node_finds_what_was_replicated_by_the_catalog_alone(
        self, pair: Pair, tmp_path: Path, random_source: random.Random
    ) -> None:
        """It is told by another process, and lists nothing."""
        blocks = chain(random_source, 4)
        store(pair.na, blocks)
        await pair.publish()
        url = f"sqlite://{tmp_path}/eu.db"
        eu = site_of(pair, "eu", f"object.url={pair.eu.url}", f"catalog.url={url}")
        with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
            node = RunningNode(
                Path(folder),
                f"object.url={pair.eu.url}",
                f"object.endpoint={pair.eu.endpoint}",
                f"object.access_key_id={pair.eu.access_key_id}",
                f"object.secret_access_key={pair.eu.secret_access_key}",
                f"catalog.url={url}",
            )
            with node, PatientClient(node.socket) as client:
                client.call("status")
                async with serving(eu):

                    async def listed() -> bool:
                        page = client.call("list", medium="object", limit=100)["blocks"]
                        return {block["key"] for block in page} == {block.key for block in blocks}

                    await eventually(listed)
                    depths = {b["key"]: b["index"] for b in client.call("list", medium="object", limit=100)["blocks"]}
        assert depths == {block.key: place for place, block in enumerate(blocks)}

    def test_the_command_stops_cleanly(self, pair: Pair) -> None:
        pair.write()
        argv = [sys.executable, "-m", "kvstore", "region", "run", "-t", str(pair.file), "-r", "eu"]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "regional service runs" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0, "".join(lines) + rest
        assert json.loads(lines[-1])["duties"] == ["replicator"]

    def test_a_budget_holds_for_one_round(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 6)
        store(pair.na, blocks)
        asyncio.run(pair.publish())
        size = blocks[0].header.envelope_bytes
        arguments = ["region", "replicate", "-t", str(pair.file), "-r", "eu", "--json", "--budget", str(2 * size)]
        for copied in (2, 4, 6):
            result = CliRunner().invoke(app, [*arguments, "--rate", "1GiB"])
            assert result.exit_code == 0, result.output
            assert stored(pair.eu).keys() == {block.key for block in blocks[:copied]}

    def test_status_and_retire_show_what_is_done(self, pair: Pair, random_source: random.Random) -> None:
        store(pair.eu, chain(random_source, 3))
        pair.write("observe", rules='[[retention]]\nttl = "60s"')

        async def one_round() -> None:
            site = Site(load(None, [], environ={}).config, load_topology(pair.file), "eu")
            async with serving(site, pace=Pace(retire=0.1)), Links.open([pair.eu]) as bucket:

                async def done() -> bool:
                    return await read_standing(bucket, "retention") is not None

                await eventually(done)

        asyncio.run(one_round())
        result = CliRunner().invoke(app, ["region", "status", "-t", str(pair.file), "-r", "eu", "--json"])
        document = json.loads(result.stdout)
        assert document["duties"]["retention"]["rounds"] >= 1
        assert not document["leases"]["retention"]["held"]
        assert CliRunner().invoke(app, ["region", "status", "-t", str(pair.file), "-r", "eu"]).exit_code == 0
        result = CliRunner().invoke(app, ["region", "retire", "-t", str(pair.file), "-r", "eu", "--json"])
        assert json.loads(result.stdout) == {"retired": False, "blocks": [], "bytes": 0}

    def test_a_configuration_of_another_region_is_refused(self, pair: Pair) -> None:
        with pytest.raises(ConfigError, match=r"the topology has .* for region 'eu'"):
            site_of(pair, "eu", "object.url=s3://elsewhere/prod")
        arguments = ["region", "run", "-t", str(pair.file), "-r", "eu", "--set", "object.url=s3://elsewhere/prod"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "object.url" in result.output


@pytest.mark.s3
async def test_a_purge_reaches_the_memory_and_disk_of_another_regions_nodes(
    pair: Pair, random_source: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burials, "POLL_SECONDS", 0.1)
    blocks = chain(random_source, 4)
    keys = [block.key for block in blocks]
    store(pair.na, blocks)
    await pair.publish()
    topology = pair.write()
    await pair.cycle(topology)
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        place = [f"object.url={pair.eu.url}", f"object.endpoint={pair.eu.endpoint}"]
        access = [
            f"object.access_key_id={pair.eu.access_key_id}",
            f"object.secret_access_key={pair.eu.secret_access_key}",
        ]
        with RunningNode(Path(folder), *place, *access) as node, PatientClient(node.socket) as client:

            async def held() -> bool:
                return all("disk" in client.call("inspect", key=key)["media"] for key in keys)

            async def warm() -> bool:
                acquired = client.acquire(keys, 5.0)
                client.release(keys[: len(acquired.media)])
                return len(acquired.media) == len(keys) and await held()

            async def clear() -> bool:
                media = {medium for key in keys for medium in client.call("inspect", key=key)["media"]}
                return media <= {"object"}  # listed until somebody asks: there is no catalog

            await eventually(warm)
            async with Links.open([pair.na]) as bucket:
                stone = Tombstone(time=end_of_second(time.time()), model="llama")
                assert await entomb(Contents(bucket), [stone]) == 4
            await pair.publish()
            assert (await pair.cycle(topology)).buried == 4
            await eventually(clear)
            assert not client.acquire(keys, 1.0).media
    assert stored(pair.eu) == {}


def test_up_is_a_node_and_its_region_with_nothing_configured() -> None:
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        small = ["host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB"]
        settings = [f"node.directory={folder}", f"node.socket={folder}/n.sock", "object.bytes=1MiB", *small]
        argv = [sys.executable, "-m", "kvstore", "up", *(text for one in settings for text in ("--set", one))]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        seen = ""
        while not ('"listening"' in seen and "regional service runs" in seen):
            line = process.stderr.readline()
            assert line, seen
            seen += line
        with PatientClient(Path(folder) / "n.sock") as client:
            assert {tier["medium"] for tier in client.call("status")["tiers"]} == {"host", "disk", "object"}
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0, seen + rest
        assert '"duties": ["evictor"]' in seen
        assert (Path(folder) / "catalog.db").exists()
        leases = asyncio.run(_lease_of(f"file://{folder}/bucket", "evictor"))
        assert leases is None or leases.expires < time.time(), "given back"


async def _lease_of(url: str, role: str) -> lease.Grant | None:
    async with Links.open([ObjectSettings(url=url)]) as bucket:
        return await lease.current(bucket, role)


def entries_of(sizes: list[int], stored: int = 100) -> list[Entry]:
    """A chain of blocks with these payloads."""
    keys = [NO_PARENT, *(BlockKey(bytes([1, place]) * 8) for place in range(len(sizes)))]
    return [Entry(keys[i + 1], size, b"n" * 16, 16, i, keys[i], stored) for i, size in enumerate(sizes)]


class TestEvictor:
    def test_what_has_no_score_goes_first_and_the_oldest_of_it(self) -> None:
        def block(name: int, stored: int) -> Entry:
            return Entry(BlockKey(bytes([name]) * 16), 5000, b"n" * 16, 16, 0, NO_PARENT, stored)

        hot, old, new = block(1, 10), block(2, 20), block(3, 30)
        scores = {hot.key: 1.0}
        assert victims([hot, new, old], scores, 1) == [old]
        assert victims([hot, new, old], scores, old.envelope_bytes + 1) == [old, new]
        assert victims([hot, new, old], scores, 1 << 40) == [old, new, hot]

    def test_the_tail_goes_before_what_it_continues(self) -> None:
        blocks = entries_of([5000] * 4)
        assert victims(blocks, {blocks[3].key: 1.0}, 1) == [blocks[3]]
        assert victims(blocks, {blocks[0].key: 1.0}, 1 << 40) == blocks[::-1]

    @given(st.data())
    def test_frees_enough_and_leaves_no_hole(self, data: st.DataObject) -> None:
        blocks: list[Entry] = []
        for number in range(data.draw(st.integers(1, 20))):
            parent = data.draw(st.sampled_from([None, *blocks]))
            depth, above = (0, NO_PARENT) if parent is None else (parent.depth + 1, parent.key)
            size, age = data.draw(st.integers(1, 30_000)), data.draw(st.integers(0, 9))
            blocks.append(Entry(BlockKey(bytes([number + 1]) * 16), size, b"n" * 16, 16, depth, above, age))
        scores = {entry.key: data.draw(st.floats(0, 9)) for entry in data.draw(st.lists(st.sampled_from(blocks)))}
        total = sum(entry.envelope_bytes for entry in blocks)
        wanted = data.draw(st.integers(0, total))
        gone = victims(blocks, scores, wanted)
        left = {entry.key for entry in blocks} - {entry.key for entry in gone}
        assert sum(entry.envelope_bytes for entry in gone) >= wanted
        assert all(entry.parent == NO_PARENT or entry.parent in left for entry in blocks if entry.key in left)

    def test_of_what_is_to_come_only_that_stays_out_which_would_go_at_once(self) -> None:
        there = entries_of([5000] * 4)
        size = there[0].envelope_bytes
        room = 8 * size  # an eighth stays free: seven blocks fit
        scores = {entry.key: 1.0 for entry in there}
        new = [BlockKey(bytes([9, place]) * 8) for place in range(4)]

        def coming(score: float) -> list[HotBlock]:
            return [HotBlock(key, [NO_PARENT, *new][i], b"n" * 16, 5000, 0.0, score) for i, key in enumerate(new)]

        assert overflow(there, scores, coming(1.0), 16 * size) == set()
        assert overflow(there, scores, coming(1.0), room) == {new[3]}, "the tail"
        assert overflow(there, scores, coming(1.1), 4 * size) == set(new), "hardly better than what is there"
        assert overflow(there, scores, coming(9.0), 5 * size) == set(), "it displaces what is there"

    async def test_the_bucket_is_kept_under_its_cap_from_the_catalog(
        self, folder_bucket: ObjectSettings, tmp_path: Path
    ) -> None:
        blocks = random_chain(random.Random(1), 32, 8192)
        store(folder_bucket, blocks)
        size = blocks[0].header.envelope_bytes
        catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db", folder_bucket.url)
        async with Links.open([folder_bucket]) as bucket, Contents.open(bucket, catalog) as contents:
            assert await make_room(contents, 32 * size) == 0, "not before the catalog covers the bucket"
            await catalog.record({block.key: Entry.of(block.header) for block in blocks})
            await catalog.complete((await catalog.status()).epoch)
            assert await make_room(contents, 64 * size) == 0
            assert await make_room(contents, 32 * size) == 4
            assert (await catalog.status()).blocks == 28
        assert stored(folder_bucket).keys() == {block.key for block in blocks[:28]}
        await catalog.close()
