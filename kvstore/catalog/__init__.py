"""The shared index of a region's bucket.

sharing     a node's part in its region: joins an object tier to a catalog
├── publisher   tells the catalog what the node did
├── follower    learns from it what others did
├── presence    says that the node lives, and how to reach it
├── pins        what is pinned on one node is pinned on all
├── hotness     what the node's engines ask for, told to the region
└── rebuild     fills it from the bucket
cursors     how far the region has come with others
purges      rings when something was purged
asking      has all nodes report now
hottest     what a whole region asks for most
base        the interface and what it speaks of; documents: what else the region's processes tell each other
├── sqlite      one file, for one machine
└── redis       Redis or Valkey, for a region; scripts: what the server runs
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvstore.catalog.base import Catalog
from kvstore.errors import ConfigError

__all__ = ["Catalog", "open_catalog"]


async def open_catalog(url: str, scope: str, password: str = "", ca_file: Path | None = None) -> Catalog:
    """The catalog at ``url`` (``sqlite:///path``, or an address that ``RedisSettings`` takes) of the bucket ``scope``.

    A server that does not answer yet is no error. Raises ConfigError.
    """
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        from kvstore.catalog.sqlite import SQLiteCatalog

        if parts.netloc or len(parts.path) < 2:
            raise ConfigError("catalog.url", url, "names no file", "Write sqlite:///path/to/catalog.db.")
        return await SQLiteCatalog.open(Path(unquote(parts.path)), scope)
    from kvstore.catalog.redis import RedisCatalog, RedisSettings

    return await RedisCatalog.open(RedisSettings(url=url, password=password, ca_file=ca_file), scope)
