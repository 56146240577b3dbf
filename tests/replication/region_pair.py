"""Two regions as tests of replication see them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from region_cases import EU_KEY, KEY

from kvstore.testing.servers import S3Server
from kvstore.testing.shaping import ShapedLink
from kvstore.tiers.object import Bucket, ObjectSettings
from replication.contents import Contents
from replication.cycle import Cycle
from replication.keys import public_text
from replication.links import Links
from replication.manifest import Manifest
from replication.publisher import publish
from replication.replicator import Replicator
from replication.topology import Topology, load_topology


def bucket_on(server: S3Server, name: str) -> ObjectSettings:
    settings = ObjectSettings(
        url=f"s3://{name}-{random.randbytes(5).hex()}/prod",
        endpoint=server.endpoint,
        region=server.region,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        connect_timeout=30.0,
        read_timeout=30.0,
        request_timeout=60.0,
        retries=0,
    )
    Bucket(settings).create()
    return settings


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
