"""A catalog in a server that Sentinel watches goes on in the replica that takes over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from kvstore.catalog import open_catalog
from kvstore.catalog.base import Entry
from kvstore.errors import CatalogUnavailable
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.redis import RedisServer, redis_sentinel
from kvstore.testing.servers import ServerUnavailable

WITHIN = 60.0


def entry(number: int) -> Entry:
    return Entry(BlockKey(bytes([number]) * 16), 1000, b"n" * 16, 64, 0, NO_PARENT, 1)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    try:
        with redis_sentinel(replicated=True) as server:
            yield server
    except ServerUnavailable as error:
        pytest.skip(str(error))


async def test_what_was_recorded_is_there_after_a_failover(server: RedisServer) -> None:
    before, after = entry(1), entry(2)
    catalog = await open_catalog(server.url, "s3://bucket")
    epoch = (await catalog.status()).epoch
    await catalog.record({before.key: before})
    with server.client() as client:
        assert client.wait(1, int(WITHIN * 1000)) == 1, "the replica has it"
    server.kill()
    deadline = time.monotonic() + WITHIN
    found: list[Entry | None] = []
    while not found:
        try:
            found = list(await catalog.lookup([before.key]))
        except CatalogUnavailable:
            assert time.monotonic() < deadline, "nobody took over"
            await asyncio.sleep(0.1)
    assert found == [before]
    await catalog.record({after.key: after})
    assert list(await catalog.lookup([after.key])) == [after]
    assert (await catalog.status()).epoch == epoch, "nodes need not read it anew"
    await catalog.close()
