"""What a region's own configuration file adds to the topology: its catalog, and the cap of its bucket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore.catalog import Catalog
from kvstore.config import Config
from kvstore.errors import ConfigError
from replication.contents import Contents
from replication.links import Links
from replication.topology import Topology


@asynccontextmanager
async def open_contents(config: Config, topology: Topology, region: str) -> AsyncIterator[Contents]:
    """The contents of the region's bucket, by its catalog if the configuration names one. Raises ConfigError."""
    async with (
        Links.open(topology.links(region)) as bucket,
        own_catalog(config, topology, region) as catalog,
        Contents.open(bucket, catalog) as contents,
    ):
        yield contents


@asynccontextmanager
async def own_catalog(config: Config, topology: Topology, region: str) -> AsyncIterator[Catalog | None]:
    """The region's catalog, closed at the end. Raises ConfigError when the configuration is that of another region."""
    from kvstore.assembly import open_catalog

    url = topology.regions[region].url
    if config.object.url and config.object.url.rstrip("/") != url.rstrip("/"):
        remedy = "Name the configuration of a node of the region, or mend the topology."
        raise ConfigError("object.url", config.object.url, f"the topology has {url} for region {region!r}", remedy)
    catalog = await open_catalog(config)
    try:
        yield catalog
    finally:
        if catalog is not None:
            await catalog.close()
