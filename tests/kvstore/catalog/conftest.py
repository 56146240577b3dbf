"""Regions with each kind of catalog."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from region_nodes import Region

from kvstore.catalog import sharing
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.testing.servers import ServerUnavailable


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a region's duties."""
    monkeypatch.setattr(sharing, "DUTY_SECONDS", 0.1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        yield Path(name)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server())
        except ServerUnavailable as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def region(request: pytest.FixtureRequest, folder: Path) -> Iterator[Region]:
    url = request.getfixturevalue("redis").url if request.param == "redis" else f"sqlite://{folder}/catalog.db"
    with ExitStack() as stack:
        yield Region(folder, url, stack)


@pytest.fixture
def redis_region(redis: RedisServer, folder: Path) -> Iterator[Region]:
    with ExitStack() as stack:
        yield Region(folder, redis.url, stack)
