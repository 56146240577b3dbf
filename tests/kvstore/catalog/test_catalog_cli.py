"""``kvstore catalog``: status and rebuild, against real catalogs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvstore.catalog import Catalog, open_catalog
from kvstore.cli import app
from kvstore.testing.blocks import random_chain
from kvstore.testing.catalog import random_entries
from kvstore.testing.conformance import put
from kvstore.testing.redis import redis_server
from kvstore.testing.servers import ServerUnavailable
from kvstore.tiers.object import ObjectSettings, ObjectTier

PASSWORD = "correct horse"


class Place:
    """A bucket and the configuration of a catalog."""

    def __init__(self, folder: Path, url: str, password: str = "") -> None:
        self.bucket = f"file://{folder}/bucket"
        self.url = url
        self.password = password

    def run(self, *command: str) -> Result:
        settings = [f"object.url={self.bucket}", f"catalog.url={self.url}", f"catalog.password={self.password}"]
        return CliRunner().invoke(app, ["catalog", *command, *(part for text in settings for part in ("--set", text))])

    async def open(self) -> Catalog:
        return await open_catalog(self.url, self.bucket, self.password)


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield Place(tmp_path, f"sqlite://{tmp_path}/catalog.db")
        return
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server(password=PASSWORD))
        except ServerUnavailable as error:
            pytest.skip(str(error))
        yield Place(tmp_path, server.url, PASSWORD)


async def test_rebuild_brings_the_catalog_in_line_with_the_bucket(place: Place) -> None:
    source = random.Random(1)
    chain = random_chain(source, 3, 10_000)
    tier = await ObjectTier.open(ObjectSettings(url=place.bucket))
    for block in chain:
        await put(tier, block)
    await tier.close()
    catalog = await place.open()
    await catalog.record(random_entries(source, 10))  # of blocks that are not there

    result = await asyncio.to_thread(place.run, "rebuild", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["blocks"] == 3
    entries = await catalog.lookup([block.key for block in chain])
    assert [entry.envelope_bytes for entry in entries if entry] == [block.header.envelope_bytes for block in chain]
    status = json.loads((await asyncio.to_thread(place.run, "status", "--json")).stdout)
    assert (status["complete"], status["blocks"]) == (True, 3)
    assert status["used_bytes"] == sum(block.header.envelope_bytes for block in chain)
    assert status["claims"] == []
    await catalog.close()


async def test_status_names_who_holds_what(place: Place) -> None:
    catalog = await place.open()
    await catalog.claim("role/evictor", "node-7", 60)
    await catalog.close()
    result = await asyncio.to_thread(place.run, "status")
    assert result.exit_code == 0, result.output
    assert "role/evictor" in result.stdout
    assert "node-7" in result.stdout
    assert "does not cover the whole bucket yet" in result.stdout


async def test_only_one_rebuilds_at_a_time(place: Place) -> None:
    catalog = await place.open()
    await catalog.claim("role/rebuild", "somebody", 60)
    await catalog.close()
    result = await asyncio.to_thread(place.run, "rebuild")
    assert result.exit_code == 1
    assert "another process" in result.output


@pytest.mark.parametrize(
    ("url", "password", "words"),
    [
        ("redis://:hunter2secret@127.0.0.1:1/0", "", ["catalog.password"]),
        ("mysql://db", "", ["redis://"]),
        ("redis://host:port/0", "", ["not an address"]),
        ("redis+sentinel://host:26379", "", ["names no service"]),
        ("redis://host:6379/first", "", ["not a number"]),
        ("sqlite:///dev/null/catalog.db", "", ["writable file"]),
        ("", "", ["no catalog is configured"]),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, url: str, password: str, words: list[str]) -> None:
    result = Place(tmp_path, url, password).run("status")
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words)
    assert "hunter2secret" not in result.output


def test_a_wrong_password_is_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server(password=PASSWORD))
        except ServerUnavailable as error:
            pytest.skip(str(error))
        for wrong in ("", "hunter2secret"):
            result = Place(tmp_path, server.url, wrong).run("status")
            assert result.exit_code == 2, result.output
            assert "catalog.password" in result.output
            assert "hunter2secret" not in result.output


def test_a_server_that_is_away_is_a_problem_for_the_command(tmp_path: Path) -> None:
    result = Place(tmp_path, "redis://127.0.0.1:1/0").run("status")
    assert result.exit_code == 1
    assert "Error" in result.output


async def test_a_file_belongs_to_one_bucket(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/catalog.db"
    await (await open_catalog(url, "s3://one")).close()
    result = await asyncio.to_thread(Place(tmp_path, url).run, "status")
    assert result.exit_code == 2
    assert "s3://one" in result.output
