"""A region as its own processes see it: its part of the topology, and what its configuration file adds (catalog, cap)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore.catalog import Catalog
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.tiers.object import ObjectSettings
from replication.contents import Contents
from replication.links import Links
from replication.topology import Topology

ALONE = "local"
"""What a region is called that knows of no others."""


@dataclass(frozen=True, slots=True)
class Site:
    """Raises ConfigError when the configuration is that of another region."""

    config: Config
    topology: Topology | None = None
    """None: there is only this region, and the configuration says where its bucket is."""
    region: str = ALONE

    def __post_init__(self) -> None:
        url = self.config.object.url
        if self.topology is None:
            if not url:
                raise ConfigError("object.url", "", "there is no bucket", "Set object.url as for the node.")
            return
        there = self.topology.regions[self.region].url
        if url and url.rstrip("/") != there.rstrip("/"):
            remedy = "Name the configuration of a node of the region, or mend the topology."
            raise ConfigError("object.url", url, f"the topology has {there} for region {self.region!r}", remedy)

    @property
    def links(self) -> Sequence[ObjectSettings]:
        """Ways to the region's own bucket, best first. Raises ConfigError."""
        from kvstore.assembly import object_settings

        return [object_settings(self.config)] if self.topology is None else self.topology.links(self.region)

    @property
    def capacity(self) -> int | None:
        """Bytes under which the bucket is kept."""
        return self.config.object.bytes

    @asynccontextmanager
    async def open_catalog(self) -> AsyncIterator[Catalog | None]:
        """The region's catalog, if one is configured. Raises ConfigError."""
        from kvstore.assembly import open_catalog

        catalog = await open_catalog(self.config)
        try:
            yield catalog
        finally:
            if catalog is not None:
                await catalog.close()

    @asynccontextmanager
    async def open_contents(self) -> AsyncIterator[Contents]:
        """What is in the region's bucket. No request is made yet. Raises ConfigError."""
        async with (
            Links.open(self.links) as bucket,
            self.open_catalog() as catalog,
            Contents.open(bucket, catalog) as contents,
        ):
            yield contents
