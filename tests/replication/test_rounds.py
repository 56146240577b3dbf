"""Three regions: a source that is slow or away holds up nobody, and one can see since when it is."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from region_cases import KEY, chain, store, stored
from region_pair import bucket_on

from kvstore.identity import BlockKey
from kvstore.testing.blocks import SealedBlock
from kvstore.testing.servers import S3Server
from kvstore.testing.shaping import ShapedLink, shaped
from kvstore.tiers.object import ObjectSettings
from replication.contents import Contents
from replication.cycle import Cycle
from replication.keys import public_text
from replication.links import Links
from replication.publisher import publish
from replication.replicator import Replicator
from replication.status import look
from replication.topology import Topology, load_topology

pytestmark = pytest.mark.s3

SOURCES = ("na", "ap")


@dataclass
class Three:
    """eu pulls from na and from ap, over a link to each."""

    eu: ObjectSettings
    sources: dict[str, ObjectSettings]
    links: dict[str, ShapedLink]
    topology: Topology
    published: dict[str, list[SealedBlock]] = field(default_factory=lambda: {name: [] for name in SOURCES})

    async def publish(self, source: str, blocks: Sequence[SealedBlock]) -> None:
        """Further blocks of a source, on its side of the link."""
        self.published[source] += blocks
        store(self.sources[source], blocks)
        async with Links.open([self.sources[source]]) as bucket:
            await publish(Contents(bucket), source, KEY)

    def has(self, *sources: str) -> bool:
        """Whether eu has what these published, and nothing else."""
        return stored(self.eu).keys() == {block.key for name in sources for block in self.published[name]}


@pytest.fixture
def three(
    ministack_server: S3Server, far_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Three]:
    for name in ("topology", "replicator"):
        monkeypatch.setattr(f"replication.{name}.STALL_SECONDS", 0.5)
    monkeypatch.setattr("replication.links.LAST_RETRY_SECONDS", 1.0)
    eu = bucket_on(ministack_server, "eu")
    sources = {name: bucket_on(far_server, name) for name in SOURCES}
    with linked(sources) as links:
        lines = ['mode = "enforce"', '[[flows]]\nfrom = "na"\nto = ["eu"]', '[[flows]]\nfrom = "ap"\nto = ["eu"]']
        for name, bucket in {"eu": eu, **sources}.items():
            credentials = tmp_path / f"{name}.credentials"
            pair = f'access_key_id = "{bucket.access_key_id}"\nsecret_access_key = "{bucket.secret_access_key}"\n'
            credentials.write_text(pair)
            endpoint = links[name].endpoint if name in links else eu.endpoint
            lines += [f'[regions.{name}]\nurl = "{bucket.url}"\nendpoints = ["{endpoint}"]']
            lines += [f'credentials_file = "{credentials}"']
            lines += [f'public_key = "{public_text(KEY.public_key())}"' if name in links else ""]
        file = tmp_path / "regions.toml"
        file.write_text("\n".join(lines))
        yield Three(eu, sources, links, load_topology(file))


@contextmanager
def linked(sources: dict[str, ObjectSettings]) -> Iterator[dict[str, ShapedLink]]:
    with shaped(sources["na"].endpoint) as na, shaped(sources["ap"].endpoint) as ap:
        yield {"na": na, "ap": ap}


@asynccontextmanager
async def replicating(three: Three, patience: float) -> AsyncIterator[Replicator]:
    """``patience``: seconds that a request waits for a link to come back."""
    async with Replicator.open(three.topology, "eu") as replicator, replicator.at_work():
        for links in replicator.far.values():
            links._patience = patience
        yield replicator


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.1)


async def rounds_until(replicator: Replicator, condition: Callable[[Cycle], bool]) -> Cycle:
    """As the service does them, until one is as it should be."""
    async with asyncio.timeout(60):
        while not condition(cycle := await replicator.round(seconds=0.3)):
            await asyncio.sleep(0.1)
    return cycle


def keys(blocks: Sequence[SealedBlock]) -> set[BlockKey]:
    return {block.key for block in blocks}


async def test_what_one_source_has_arrives_while_another_is_waited_for(
    three: Three, random_source: random.Random
) -> None:
    for source in SOURCES:
        await three.publish(source, chain(random_source, 4))
    three.links["ap"].cut()
    async with replicating(three, patience=600.0) as replicator:
        cycle = asyncio.create_task(replicator.round())
        await until(lambda: three.has("na"))
        assert not cycle.done()
        cycle.cancel()


async def test_a_source_that_is_away_costs_the_others_no_round_and_comes_back(
    three: Three, random_source: random.Random
) -> None:
    for source in SOURCES:
        await three.publish(source, chain(random_source, 4))
    three.links["ap"].cut()
    before = int(time.time())
    async with replicating(three, patience=2.0) as replicator:
        cycle = await rounds_until(replicator, lambda cycle: bool(cycle.away_since.get("ap")) and three.has("na"))
        assert cycle.problems["ap"].startswith("away since 20")
        assert before <= cycle.away_since["ap"] <= time.time()
        for links in replicator.far.values():
            links._patience = 600.0
        for _ in range(2):
            await three.publish("na", chain(random_source, 2))
            cycle = await rounds_until(replicator, lambda _: three.has("na"))
        assert replicator._pulls.keys() == {"ap"}, "it is still being asked"
        status = (await look(replicator.near, three.topology, "eu"))["sources"]
        assert (status["na"]["away_since"], status["na"]["problem"]) == (None, "")
        assert before <= status["ap"]["away_since"] <= time.time()
        three.links["ap"].reset()
        three.links["ap"].heal()
        cycle = await rounds_until(replicator, lambda cycle: three.has("na", "ap") and "ap" in cycle.lag)
        assert (cycle.away_since["ap"], cycle.problems) == (0.0, {})
        assert (await look(replicator.near, three.topology, "eu"))["sources"]["ap"]["away_since"] is None


async def test_a_slow_copy_holds_up_nobody_and_nothing_of_it_is_sent_by_another(
    three: Three, random_source: random.Random
) -> None:
    shared, own = chain(random_source, 3), chain(random_source, 2)
    await three.publish("ap", shared)
    async with replicating(three, patience=600.0) as replicator:
        await rounds_until(replicator, lambda cycle: three.has("ap"))
        more = chain(random_source, 5)
        await three.publish("ap", more)
        three.links["ap"].shape.bytes_per_second = 20_000
        await rounds_until(replicator, lambda _: "ap" in replicator._visits)
        assert not keys(more) <= stored(three.eu).keys()
        await three.publish("na", [*more, *own])
        await rounds_until(replicator, lambda cycle: keys(own) <= stored(three.eu).keys() and "na" in cycle.lag)
        assert "ap" in replicator._visits, "still under way"
        three.links["ap"].shape.bytes_per_second = None
        cycle = await rounds_until(replicator, lambda cycle: "ap" in cycle.lag)
        # A round may tell of a copy that ended before it began, and of the next, which found nothing to do.
        copied = sum(report.copied.nbytes for report in cycle.flows if report.source == "ap")
        assert copied == sum(block.header.envelope_bytes for block in more)
        assert three.links["na"].bytes_down < copied
