"""Two regions, each with an S3 server of its own, and a shaped link from the second to the first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from region_cases import EU_KEY, KEY

from kvstore.testing.servers import S3Server, ServerUnavailable, ministack
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import Bucket, ObjectSettings
from replication.contents import Contents
from replication.keys import public_text
from replication.links import Links
from replication.manifest import Manifest
from replication.publisher import publish
from replication.replicator import Cycle, Replicator
from replication.topology import Topology, load_topology


@pytest.fixture(scope="session")
def far_server() -> Iterator[S3Server]:
    try:
        with ministack() as server:
            yield server
    except ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def random_source(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def bucket_on(server: S3Server, name: str) -> ObjectSettings:
    settings = ObjectSettings(
        url=f"s3://{name}-{random.randbytes(5).hex()}/prod",
        endpoint=server.endpoint,
        region=server.region,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        connect_timeout=3.0,
        read_timeout=3.0,
        request_timeout=30.0,
        retries=0,
    )
    Bucket(settings).create()
    return settings


@pytest.fixture
def na(far_server: S3Server) -> ObjectSettings:
    """The source's bucket, without a link in between."""
    return bucket_on(far_server, "na")


@pytest.fixture
def eu(ministack_server: S3Server) -> ObjectSettings:
    """The destination's bucket."""
    return bucket_on(ministack_server, "eu")


@pytest.fixture
def link(na: ObjectSettings) -> Iterator[ShapedLink]:
    """The way from eu to na."""
    with shaped(na.endpoint, Shape(delay=0.005)) as running:
        yield running


@pytest.fixture
def na_far(na: ObjectSettings, link: ShapedLink) -> ObjectSettings:
    """The source's bucket as the destination reaches it."""
    return replace(na, endpoint=link.endpoint)


@dataclass
class Pair:
    """A topology of two regions, as a file, and their buckets."""

    file: Path
    na: ObjectSettings
    eu: ObjectSettings
    link: ShapedLink

    def write(self, mode: str = "enforce", flow: str = "", rules: str = "", na_key: str = "") -> Topology:
        """``flow`` and ``rules`` are lines of TOML."""
        public = na_key or public_text(KEY.public_key())
        for name, region in (("na", self.na), ("eu", self.eu)):
            pair = f'access_key_id = "{region.access_key_id}"\nsecret_access_key = "{region.secret_access_key}"\n'
            (self.file.parent / f"{name}.credentials").write_text(pair)
        na, eu = (self.file.parent / f"{name}.credentials" for name in ("na", "eu"))
        self.file.write_text(
            f'mode = "{mode}"\n'
            f'[regions.na]\nurl = "{self.na.url}"\nendpoints = ["{self.link.endpoint}"]\n'
            f'location = "US"\npublic_key = "{public}"\ncredentials_file = "{na}"\n'
            f'[regions.eu]\nurl = "{self.eu.url}"\nendpoints = ["{self.eu.endpoint}"]\n'
            f'location = "DE"\npublic_key = "{public_text(EU_KEY.public_key())}"\ncredentials_file = "{eu}"\n'
            f'[[flows]]\nfrom = "na"\nto = ["eu"]\n{flow}\n{rules}\n'
        )
        return load_topology(self.file)

    async def publish(self) -> Manifest:
        """What na's own service does, on its side of the link."""
        async with Links.open([self.na]) as bucket:
            return await publish(Contents(bucket), "na", KEY)

    async def cycle(self, topology: Topology) -> Cycle:
        async with Replicator.open(topology, "eu") as replicator:
            return await replicator.cycle()


@pytest.fixture
def pair(na: ObjectSettings, eu: ObjectSettings, link: ShapedLink, tmp_path: Path) -> Pair:
    made = Pair(tmp_path / "regions.toml", na, eu, link)
    made.write()
    return made
