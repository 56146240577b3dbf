"""SQLite and Redis keep the contract of every catalog."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kvstore.catalog import Catalog, open_catalog, sqlite
from kvstore.catalog import redis as redis_catalog
from kvstore.identity import BlockKey
from kvstore.testing.catalog import CatalogConformance
from kvstore.testing.redis import RedisServer, redis_cluster, redis_sentinel, redis_server
from kvstore.testing.servers import ServerUnavailable


class TestSQLite(CatalogConformance):
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.url = f"sqlite://{tmp_path}/catalog.db"

    async def open(self) -> Catalog:
        return await open_catalog(self.url, "s3://bucket")

    def bounded_modules(self) -> list[object]:
        return [sqlite]

    async def damage(self, catalog: Catalog, key: BlockKey, value: bytes) -> bool:
        with closing(sqlite3.connect(urlsplit(self.url).path)) as db, db:
            db.execute("UPDATE blocks SET value = ? WHERE key = ?", (value, key))
        return True


class RedisConformance(CatalogConformance):
    """On one server for all tests; each test has a catalog of its own."""

    @classmethod
    def start(cls) -> AbstractContextManager[RedisServer]:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[RedisServer]:
        with ExitStack() as stack:
            try:
                server = stack.enter_context(cls.start())
            except ServerUnavailable as error:
                pytest.skip(str(error))
            yield server

    @pytest.fixture(autouse=True)
    def _place(self, server: RedisServer) -> None:
        self.server = server
        self.scope = f"s3://{uuid.uuid4().hex}"

    async def open(self) -> Catalog:
        return await open_catalog(self.server.url, self.scope, self.server.password, self.server.ca_file)

    def bounded_modules(self) -> list[object]:
        return [redis_catalog]

    async def damage(self, catalog: Catalog, key: BlockKey, value: bytes) -> bool:
        assert isinstance(catalog, redis_catalog.RedisCatalog)
        with self.server.client() as client:
            client.hset(catalog.names[1], key, value)
        return True


class TestRedis(RedisConformance):
    @classmethod
    def start(cls) -> AbstractContextManager[RedisServer]:
        return redis_server()


class TestRedisWithPasswordAndTLS(RedisConformance):
    @classmethod
    def start(cls) -> AbstractContextManager[RedisServer]:
        return redis_server(password="correct horse", tls=True)


class TestRedisSentinel(RedisConformance):
    @classmethod
    def start(cls) -> AbstractContextManager[RedisServer]:
        return redis_sentinel()


class TestRedisCluster(RedisConformance):
    @classmethod
    def start(cls) -> AbstractContextManager[RedisServer]:
        return redis_cluster()
