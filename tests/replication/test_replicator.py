"""Two regions with real S3 servers: publish, plan, copy, and everything that may go wrong on the way."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from region_cases import KEY, LLAMA, chain, hot, manifest_of, store, stored
from region_pair import Pair, bucket_on
from typer.testing import CliRunner, Result

from kvstore.cli import app
from kvstore.testing.blocks import SealedBlock
from kvstore.testing.servers import S3Server
from kvstore.testing.shaping import Shape, shaped
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import block_name, hotness_name, namespace_name, tombstone_name
from kvstore.tiers.object.objects import Objects
from kvstore.tombstones import Tombstone
from replication import lease
from replication.contents import Contents
from replication.copier import Outcome
from replication.cursor import Cursor, Ledger
from replication.links import Links
from replication.names import manifest_name
from replication.planner import LeftOut
from replication.publisher import entomb
from replication.replicator import Replicator

pytestmark = pytest.mark.s3


def put(settings: ObjectSettings, name: str, body: bytes) -> None:
    obstore.put(Objects.connect(settings).store, name, body)


def keys(blocks: list[SealedBlock]) -> set[bytes]:
    return {block.key for block in blocks}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["region", *arguments])


class TestFlow:
    async def test_what_is_published_arrives_with_its_namespace(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 8)
        store(pair.na, blocks)
        manifest = await pair.publish()
        assert {b.key for b in manifest.blocks} == keys(blocks)
        cycle = await pair.cycle(pair.write())
        assert cycle.problems == {}
        assert stored(pair.eu) == {b.key: bytes(b.envelope) for b in blocks}
        fields = json.loads(
            obstore.get(Objects.connect(pair.eu).store, namespace_name(LLAMA.digest)).bytes().to_bytes()
        )
        assert fields == LLAMA.to_dict()
        lag = cycle.lag["na"]
        assert lag is not None
        assert lag >= 0

    async def test_a_second_cycle_copies_only_what_is_new(self, pair: Pair, random_source: random.Random) -> None:
        first, second = chain(random_source, 5), chain(random_source, 3)
        store(pair.na, first)
        await pair.publish()
        await pair.cycle(pair.write())
        store(pair.na, second)
        await pair.publish()
        cycle = await pair.cycle(pair.write())
        assert {b.key for b in cycle.flows[0].plan.blocks} == keys(second)
        assert cycle.flows[0].plan.left_out[LeftOut.PRESENT].blocks == 5

    async def test_observe_copies_nothing_and_says_what_it_would_cost(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 4)
        store(pair.na, blocks)
        await pair.publish()
        async with Replicator.open(pair.write("observe", flow="price_per_gb = 0.5"), "eu") as replicator:
            report = (await replicator.plan()).flows[0]
        assert len(report.plan.blocks) == 4
        assert report.cost == pytest.approx(sum(b.header.envelope_bytes for b in blocks) / 1e9 * 0.5)
        assert stored(pair.eu) == {}

    async def test_hotness_of_nodes_decides_what_goes_first(self, pair: Pair, random_source: random.Random) -> None:
        cold, warm, hottest = (chain(random_source, 2) for _ in range(3))
        store(pair.na, [*cold, *warm, *hottest])
        for node, blocks, score in (("a", warm, 2.0), ("a2", hottest, 3.0), ("b", hottest, 3.0)):
            snapshot = HotnessSnapshot(time.time(), 600.0, {block.key: score for block in blocks})
            put(pair.na, hotness_name(node), snapshot.pack())
        manifest = await pair.publish()
        scores = {block.key: block.score for block in manifest.blocks}
        assert scores[hottest[1].key] == pytest.approx(6.0, rel=0.1)
        assert keys(cold).isdisjoint(scores)
        cycle = await pair.cycle(pair.write(flow="max_bytes = 40000"))
        assert stored(pair.eu).keys() == keys(hottest)
        assert cycle.flows[0].plan.left_out[LeftOut.BYTES].blocks == 1

    async def test_residency_keeps_a_tenant_at_home(self, pair: Pair, random_source: random.Random) -> None:
        store(pair.na, chain(random_source, 3))
        await pair.publish()
        rules = '[[residency]]\ntenants = ["def*"]\nallowed = ["US"]'
        cycle = await pair.cycle(pair.write(rules=rules))
        assert cycle.flows[0].plan.left_out[LeftOut.RESIDENCY].blocks == 3
        assert stored(pair.eu) == {}

    async def test_a_chain_with_a_hole_is_not_published_beyond_it(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 5)
        store(pair.na, [*blocks[:2], *blocks[3:]])
        assert {b.key for b in (await pair.publish()).blocks} == keys(blocks[:2])

    async def test_sequences_rise_even_when_the_last_manifest_was_lost(self, pair: Pair) -> None:
        first = await pair.publish()
        second = await pair.publish()
        obstore.delete(Objects.connect(pair.na).store, manifest_name("na"))
        third = await pair.publish()
        assert first.sequence < second.sequence < third.sequence


class TestOtherServers:
    async def test_from_ceph_to_ministack_and_back(
        self, radosgw_server: S3Server, eu: ObjectSettings, tmp_path: Path, random_source: random.Random
    ) -> None:
        """Signatures are checked there, and conditional creation is another implementation."""
        ceph = bucket_on(radosgw_server, "na")
        blocks = chain(random_source, 12)
        store(ceph, blocks)
        with shaped(ceph.endpoint, Shape(delay=0.01)) as link:
            pair = Pair(tmp_path / "regions.toml", ceph, eu, link)
            await pair.publish()
            assert (await pair.cycle(pair.write())).problems == {}
        assert stored(eu) == {b.key: bytes(b.envelope) for b in blocks}
        other = bucket_on(radosgw_server, "back")
        with shaped(eu.endpoint) as link:
            pair = Pair(tmp_path / "regions.toml", eu, other, link)
            await pair.publish()
            for copied in (12, 0):
                cycle = await pair.cycle(pair.write())
                assert cycle.flows[0].copied.outcomes.get(Outcome.COPIED, 0) == copied
        assert stored(other) == stored(eu)

    async def test_within_ceph_the_server_copies_every_byte(
        self, radosgw_server: S3Server, tmp_path: Path, random_source: random.Random
    ) -> None:
        """The replicator sees headers only, so nobody but this test compares what arrived."""
        na, eu = (bucket_on(radosgw_server, name) for name in ("na", "eu"))
        blocks = chain(random_source, 4, 3 << 20)
        store(na, blocks)
        with shaped(radosgw_server.endpoint) as link:
            pair = Pair(tmp_path / "regions.toml", na, replace(eu, endpoint=link.endpoint), link)
            await pair.publish()
            cycle = await pair.cycle(pair.write())
            assert (cycle.problems, cycle.flows[0].copied.outcomes) == ({}, {Outcome.COPIED: 4})
            assert link.bytes_up + link.bytes_down < 1 << 20, "of twelve"
        assert stored(eu) == {b.key: bytes(b.envelope) for b in blocks}

    async def test_a_lease_in_ceph(self, radosgw_server: S3Server) -> None:
        async with Links.open([bucket_on(radosgw_server, "na")]) as bucket, lease.hold(bucket, "replicator"):
            with pytest.raises(lease.LeaseTaken):
                await lease._take(bucket, "replicator", "another", 30.0)


class TestTrust:
    async def cycle_with(self, pair: Pair, raw: bytes) -> str:
        put(pair.na, manifest_name("na"), raw)
        cycle = await pair.cycle(pair.write())
        assert not cycle.flows
        return cycle.problems["na"]

    async def test_forged_truncated_and_replayed_manifests_are_refused(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 2)
        store(pair.na, blocks)

        def sealed(sequence: int) -> bytes:
            return manifest_of(hot(blocks), sequence=sequence).sealed(KEY)

        assert "forged" in await self.cycle_with(pair, manifest_of(hot(blocks)).sealed(Ed25519PrivateKey.generate()))
        assert "truncated" in await self.cycle_with(pair, sealed(5)[:-100])
        assert "na" in await self.cycle_with(pair, manifest_of(hot(blocks), region="eu").sealed(KEY))
        assert stored(pair.eu) == {}
        put(pair.na, manifest_name("na"), sealed(7))
        await pair.cycle(pair.write())
        assert len(stored(pair.eu)) == 2
        assert "replayed: its sequence 6 is older than 7" in await self.cycle_with(pair, sealed(6))

    async def test_an_oversize_manifest_is_not_read(self, pair: Pair) -> None:
        assert "buffer" in await self.cycle_with(pair, bytes((16 << 20) + 1))


class TestTombstones:
    async def bury(self, settings: ObjectSettings, stone: Tombstone) -> int:
        async with Links.open([settings]) as bucket:
            return await entomb(Contents(bucket), [stone])

    async def test_a_purge_reaches_the_mirror(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 4)
        store(pair.na, blocks)
        await pair.publish()
        await pair.cycle(pair.write())
        assert await self.bury(pair.na, Tombstone(time=time.time(), tenant="default")) == 4
        assert stored(pair.na) == {}
        await pair.publish()
        cycle = await pair.cycle(pair.write())
        assert cycle.buried == 4
        assert stored(pair.eu) == {}

    async def test_a_stale_manifest_does_not_bring_a_deleted_block_back(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        """The source still lists and holds what the destination buried."""
        blocks = chain(random_source, 4)
        store(pair.na, blocks)
        await pair.publish()
        await pair.cycle(pair.write())
        await self.bury(pair.eu, Tombstone(time=time.time(), prefix=blocks[1].key))
        assert stored(pair.eu).keys() == keys(blocks[:1])
        cycle = await pair.cycle(pair.write())
        assert cycle.flows[0].plan.left_out[LeftOut.TOMBSTONE].blocks == 3
        assert stored(pair.eu).keys() == keys(blocks[:1])

    async def test_a_purge_in_the_middle_of_a_copy_takes_what_was_under_way(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 6)
        store(pair.na, blocks)
        await pair.publish()
        stone = Tombstone(time=time.time(), model="llama")

        def purge(*_: object) -> None:
            put(pair.eu, tombstone_name(stone.identity), stone.to_json().encode())

        async with Replicator.open(pair.write(), "eu") as replicator:
            cycle = await replicator.cycle(purge)
        assert cycle.buried == 6
        assert stored(pair.eu) == {}

    async def test_a_block_copied_after_the_purge_is_as_dead(self, pair: Pair, random_source: random.Random) -> None:
        """The time of creation is the block's own, not the copy's."""
        blocks = chain(random_source, 2)
        store(pair.na, blocks)
        stale = await pair.publish()
        await self.bury(pair.na, Tombstone(time=time.time(), model="llama"))
        store(pair.na, blocks)  # a node that had not heard of it writes them back
        put(pair.na, manifest_name("na"), stale.sealed(KEY))
        await pair.cycle(pair.write())
        assert len(stored(pair.eu)) == 2, "nobody could know yet"
        manifest = await pair.publish()
        assert manifest.blocks == []
        assert stored(pair.na) == {}
        await pair.cycle(pair.write())
        assert stored(pair.eu) == {}

    async def test_what_is_computed_after_the_purge_is_replicated(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        await self.bury(pair.na, Tombstone(time=time.time(), tenant="default"))
        blocks = chain(random_source, 2)
        store(pair.na, blocks)
        await pair.publish()
        await pair.cycle(pair.write())
        assert stored(pair.eu).keys() == keys(blocks)

    async def test_what_was_computed_anew_between_two_manifests_is_not_deleted(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        """The manifest before the purge knows an older block under the same key."""
        blocks = chain(random_source, 2)
        store(pair.na, blocks)
        await pair.publish()
        await self.bury(pair.na, Tombstone(time=time.time(), tenant="default"))
        anew = []
        for block in blocks:
            header = replace(block.header, created=time.time() + 1)
            header.pack_into(block.envelope)
            anew.append(SealedBlock(header, block.envelope))
        store(pair.na, anew)
        assert {block.key for block in (await pair.publish()).blocks} == keys(blocks)
        assert stored(pair.na).keys() == keys(blocks)


class TestMoney:
    async def test_a_month_costs_no_more_than_it_may(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 6)
        store(pair.na, blocks)
        await pair.publish()
        size = blocks[0].header.envelope_bytes
        topology = pair.write(flow=f"price_per_gb = 1.0\nmoney_per_month = {3.5 * size / 1e9}")
        for _ in range(2):
            cycle = await pair.cycle(topology)
        assert len(stored(pair.eu)) == 3
        assert cycle.flows[0].plan.left_out[LeftOut.MONEY].blocks == 1

    async def test_a_new_month_begins_at_nothing(self) -> None:
        cursor = Cursor("na")
        november = 1_795_000_000.0
        cursor.spending("f", november).nbytes = 7
        assert cursor.spending("f", november).nbytes == 7
        assert cursor.spending("f", november + 31 * 86400).nbytes == 0

    async def test_bytes_are_charged_before_they_are_sent(self, pair: Pair) -> None:
        async with Links.open([pair.eu]) as bucket:
            ledger = Ledger(bucket, Cursor("na"), "flow", limit=100)
            assert await ledger.spend(60)
            written = await Cursor.load(bucket, "na")
            assert written.spending("flow", time.time()).nbytes == 100, "as much as there is, up to a step"
            assert await ledger.spend(40)
            assert not await ledger.spend(1)
            await ledger.settle()
            assert (await Cursor.load(bucket, "na")).spending("flow", time.time()).nbytes == 100


class TestBreaks:
    async def test_a_cut_in_the_middle_heals_and_nothing_is_sent_twice(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        blocks = chain(random_source, 40, 100_000)
        store(pair.na, blocks)
        await pair.publish()
        topology = pair.write()
        pair.link.shape.bytes_per_second = 2e6
        async with Replicator.open(topology, "eu") as replicator:
            arrived = 0

            def cut_after_ten(*_: object) -> None:
                nonlocal arrived
                arrived += 1
                if arrived == 10:
                    pair.link.cut()
                    asyncio.get_running_loop().call_later(0.5, pair.link.heal)

            await replicator.cycle(cut_after_ten)
        assert stored(pair.eu) == {b.key: bytes(b.envelope) for b in blocks}
        total = sum(b.header.envelope_bytes for b in blocks)
        assert pair.link.bytes_down < 1.1 * total

    async def test_damaged_blocks_are_a_problem_and_do_not_hold_up_the_rest(
        self, pair: Pair, random_source: random.Random
    ) -> None:
        good, bad = chain(random_source, 3), chain(random_source, 3)
        store(pair.na, [*good, *bad])
        await pair.publish()
        name = block_name(LLAMA.digest, bad[1].key)
        put(pair.na, name, bytes(bad[1].envelope)[:5000] + bytes(len(bad[1].envelope) - 5000))
        topology = pair.write()
        cycle = await pair.cycle(topology)
        assert "1 blocks were damaged" in cycle.problems["na"]
        assert stored(pair.eu).keys() == keys([*good, bad[0]])
        assert cycle.lag["na"] is not None
        put(pair.na, name, bytes(bad[1].envelope))
        assert (await pair.cycle(topology)).problems == {}
        assert stored(pair.eu).keys() == keys([*good, *bad])

    async def test_an_offline_source_is_a_problem_and_later_none(
        self, pair: Pair, random_source: random.Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("replication.topology.STALL_SECONDS", 0.5)
        blocks = chain(random_source, 2)
        store(pair.na, blocks)
        await pair.publish()
        topology = pair.write()
        pair.link.cut()
        async with Replicator.open(topology, "eu") as replicator:
            for link in (replicator.near, *replicator.far.values()):
                link._patience = 0.0
            assert "na" in (await replicator.plan()).problems
        pair.link.heal()
        pair.link.reset()
        assert (await pair.cycle(topology)).problems == {}
        assert stored(pair.eu).keys() == keys(blocks)

    async def test_kill_9_and_go_on_without_sending_again(self, pair: Pair, random_source: random.Random) -> None:
        blocks = chain(random_source, 60, 100_000)
        store(pair.na, blocks)
        await pair.publish()
        pair.write()
        pair.link.shape.bytes_per_second = 1.5e6
        argv = [sys.executable, "-m", "kvstore", "region", "replicate", "-t", str(pair.file), "-r", "eu"]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(stored(pair.eu)) < 15:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        pair.link.reset()
        arrived = stored(pair.eu)
        assert 15 <= len(arrived) < 60
        assert arrived.keys() == keys(blocks[: len(arrived)]), "whole prefixes at every moment"
        sent = pair.link.bytes_down
        cycle = await pair.cycle(pair.write())
        assert stored(pair.eu) == {b.key: bytes(b.envelope) for b in blocks}
        missing = sum(b.header.envelope_bytes for b in blocks[len(arrived) :])
        assert cycle.flows[0].copied.nbytes == missing
        assert pair.link.bytes_down - sent < missing + sum(map(len, arrived.values())) // 2

    async def test_two_replicators_one_works(self, pair: Pair) -> None:
        async with Links.open([pair.eu]) as one, Links.open([pair.eu]) as other:
            async with lease.hold(one, "replicator") as grant:
                with pytest.raises(lease.LeaseTaken, match=grant.holder):
                    async with lease.hold(other, "replicator"):
                        pass
            async with lease.hold(other, "replicator") as next_grant:
                assert next_grant.epoch == grant.epoch + 1

    async def test_of_many_who_ask_at_once_one_gets_the_lease(self, pair: Pair) -> None:
        async with Links.open([pair.eu]) as bucket:

            async def attempt(name: str) -> bool:
                try:
                    await lease._take(bucket, "publisher", name, 30.0)
                except lease.LeaseTaken:
                    return False
                return True

            assert sum(await asyncio.gather(*(attempt(f"p{i}") for i in range(12)))) == 1

    async def test_an_expired_lease_is_taken_over_and_its_holder_stops(self, pair: Pair) -> None:
        async with Links.open([pair.eu]) as bucket:

            async def lose_it() -> None:
                async with lease.hold(bucket, "replicator", seconds=1.5) as grant:
                    taken = replace(grant, epoch=grant.epoch + 1, holder="another", expires=time.time() + 30)
                    await lease._write(bucket, "replicator", taken, create=True)
                    await asyncio.sleep(30)

            with pytest.raises(lease.LeaseTaken, match="was lost"):
                await lose_it()


class TestCommands:
    def published(self, pair: Pair, random_source: random.Random) -> list[SealedBlock]:
        blocks = chain(random_source, 5)
        store(pair.na, blocks)
        return blocks

    def json(self, *arguments: str) -> Any:
        result = command(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def test_the_whole_story(self, pair: Pair, random_source: random.Random) -> None:
        blocks = self.published(pair, random_source)
        keyfile = pair.file.parent / "na.pem"
        made = command("key", str(keyfile))
        public = made.stdout.split('"')[1]
        pair.write(na_key=public, flow="price_per_gb = 1.0")
        source, destination = ("-t", str(pair.file), "-r", "na"), ("-t", str(pair.file), "-r", "eu")
        assert self.json("publish", *source, "--key", str(keyfile))["blocks"] == 5
        eu_key = pair.file.parent / "eu.pem"
        command("key", str(eu_key))
        assert command("publish", *destination, "--key", str(eu_key)).exit_code == 2
        planned = self.json("plan", *source)
        assert planned["flows"] == []
        plan = command("plan", *destination, "--json")
        assert json.loads(plan.stdout)["flows"][0]["planned"]["blocks"] == 5
        done = json.loads(command("replicate", *destination, "--json").stdout)
        assert done["flows"][0]["copied"]["copied"] == 5
        assert stored(pair.eu).keys() == keys(blocks)
        status = self.json("status", *destination)
        assert status["sources"]["na"]["blocks"] == 5
        assert status["sources"]["na"]["month_bytes"] == sum(b.header.envelope_bytes for b in blocks)
        assert not status["leases"]["replicator"]["held"]
        assert "na" in command("status", *destination).stdout
        assert self.json("purge", *source, "--tenant", "default", "--yes")["deleted"] == 5

    def test_bad_input_names_the_remedy(self, pair: Pair) -> None:
        unknown = command("status", "-t", str(pair.file), "-r", "mars")
        assert unknown.exit_code == 2
        assert "na, eu" in unknown.output
        assert command("purge", "-t", str(pair.file), "-r", "na", "--yes").exit_code == 2

    def test_a_held_lease_is_exit_status_1(self, pair: Pair) -> None:
        async def take() -> None:
            async with Links.open([pair.eu]) as bucket:
                await lease._take(bucket, "replicator", "somebody", 60.0)

        asyncio.run(take())
        result = command("replicate", "-t", str(pair.file), "-r", "eu")
        assert result.exit_code == 1
        assert "has the lease" in result.output

    def test_watch_goes_on_until_it_is_told_to_stop(self, pair: Pair, random_source: random.Random) -> None:
        argv = [sys.executable, "-m", "kvstore", "region", "replicate", "-t", str(pair.file), "-r", "eu"]
        process = subprocess.Popen([*argv, "--watch", "--interval", "0.2"], stdout=subprocess.DEVNULL)
        try:
            blocks = self.published(pair, random_source)
            asyncio.run(pair.publish())
            while stored(pair.eu).keys() != keys(blocks):
                assert process.poll() is None
                time.sleep(0.1)
        finally:
            process.terminate()
        assert process.wait(60) == 0
