"""The region's catalog as the API sees it: opened when first asked for, and asked at most once a second."""

from __future__ import annotations

import asyncio

from kvstore.admin.cached import Cached
from kvstore.admin.models.status import CatalogInfo, ClaimInfo
from kvstore.catalog.base import Catalog
from kvstore.catalog.documents import Documents
from kvstore.catalog.presence import FOLDER, Presence, apis, present, this_host
from kvstore.config import Config
from kvstore.errors import ConfigError

STATUS_SECONDS = 1.0


class CatalogView:
    """Of a configuration that names a catalog. In one event loop; raises CatalogUnavailable."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._catalog: Catalog | None = None
        self._opening = asyncio.Lock()
        self.status = Cached(self._status, STATUS_SECONDS)
        self.nodes = Cached(self._nodes, STATUS_SECONDS)

    async def close(self) -> None:
        if self._catalog is not None:
            await self._catalog.close()

    async def _status(self) -> CatalogInfo:
        found = await (await self._open()).status()
        return CatalogInfo(
            epoch=found.epoch,
            complete=found.complete,
            blocks=found.blocks,
            used_bytes=found.used_bytes,
            changes=found.changes,
            claims=[ClaimInfo(name=one.name, holder=one.holder, expires=one.expires) for one in found.claims],
        )

    async def documents(self) -> Documents:
        """What the processes of the region tell each other. Raises ConfigError."""
        return (await self._open()).documents

    async def apis(self, name: str) -> list[str]:
        """Addresses of the other nodes' APIs. ``name``: of the node here."""
        return apis((node for node in await self.nodes() if node.name != name), this_host())

    async def _nodes(self) -> list[Presence]:
        return present((await (await self._open()).documents.read_all(FOLDER)).values())

    async def _open(self) -> Catalog:
        from kvstore.assembly import open_catalog

        async with self._opening:
            if self._catalog is None:
                self._catalog = await open_catalog(self._config)
            if self._catalog is None:
                raise ConfigError("catalog.url", "", "no catalog is configured", "Set it to redis://host:6379/0.")
            return self._catalog
