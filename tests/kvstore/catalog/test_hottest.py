"""What a whole region asks for most, from the catalog: the prompts, and the command that shows them."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from region_nodes import SPACE
from typer.testing import CliRunner, Result

from kvstore.catalog import Catalog, open_catalog
from kvstore.catalog.base import Entry
from kvstore.catalog.cursors import SourceCursor
from kvstore.catalog.hottest import hottest
from kvstore.catalog.presence import Presence
from kvstore.cli import app
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.documents import write_namespace
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.objects import Objects


def block(name: int, parent: BlockKey = NO_PARENT, depth: int = 0) -> Entry:
    return Entry(BlockKey(bytes([name]) * 16), 5000, SPACE.digest, 16, depth, parent, 9)


SYSTEM = block(1)
ONE = block(2, SYSTEM.key, 1)
TWO = block(3, SYSTEM.key, 1)
TAIL = block(4, TWO.key, 2)
GONE = block(5)


async def told(catalog: Catalog) -> None:
    """By two nodes, of three prompts of which one is not in the bucket any more."""
    await catalog.record({entry.key: entry for entry in (SYSTEM, ONE, TWO, TAIL)})
    now = time.time()
    for node, scores in (
        ("a", {SYSTEM.key: 4.0, ONE.key: 1.0, GONE.key: 9.0}),
        ("b", {SYSTEM.key: 2.0, TWO.key: 1.5, TAIL.key: 1.6}),
    ):
        await catalog.documents.put(f"hotness/{node}", HotnessSnapshot(now, 3600.0, scores).pack(), 60)


def run(folder: Path, *command: str) -> Result:
    settings = [f"object.url=file://{folder}/bucket", f"catalog.url=sqlite://{folder}/catalog.db"]
    return CliRunner().invoke(app, [*command, *(part for text in settings for part in ("--set", text))])


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return asyncio.run(open_catalog(f"sqlite://{tmp_path}/catalog.db", f"file://{tmp_path}/bucket"))


def test_prompts_count_what_all_nodes_said_and_save_all_that_is_before_their_end(catalog: Catalog) -> None:
    asyncio.run(told(catalog))
    chains = asyncio.run(hottest(catalog, 10))
    assert [(chain.key, chain.tokens // 16, chain.nodes) for chain in chains] == [
        (SYSTEM.key, 1, 2),
        (TAIL.key, 3, 1),
        (ONE.key, 2, 1),
    ], "the middle of a prompt is not one of its own"
    assert [chain.seconds for chain in chains] == pytest.approx([6.0, 3 * 1.6, 2 * 1.0], rel=0.01)
    assert chains[1].nbytes == 3 * TAIL.envelope_bytes
    assert [chain.key for chain in asyncio.run(hottest(catalog, 1))] == [SYSTEM.key]
    asyncio.run(catalog.close())


def test_the_command_shows_them(catalog: Catalog, tmp_path: Path) -> None:
    empty = run(tmp_path, "hot", "--region", "--json")
    assert empty.exit_code == 0, empty.output
    assert json.loads(empty.stdout) == []

    async def fill() -> None:
        await told(catalog)
        await write_namespace(Objects.connect(ObjectSettings(url=f"file://{tmp_path}/bucket")), SPACE)

    asyncio.run(fill())
    first = json.loads(run(tmp_path, "hot", "--region", "--json").stdout)[0]
    assert (first["key"], first["model"], first["tokens"]) == (SYSTEM.key.hex(), "tiny", 16)
    shown = run(tmp_path, "hot", "--region", "--limit", "1").stdout
    assert SYSTEM.key.hex() in shown
    assert ONE.key.hex() not in shown
    asyncio.run(catalog.close())


def test_a_region_without_a_catalog_is_refused() -> None:
    result = CliRunner().invoke(app, ["hot", "--region"])
    assert result.exit_code == 2
    assert "no catalog is configured" in result.output


def test_catalog_status_shows_nodes_and_sources(catalog: Catalog, tmp_path: Path) -> None:
    here = Presence.here("gpu-1", "eu", "http://10.0.0.3:7070")
    cursor = SourceCursor(
        source="na", sequence=7, published=1.0, caught_up=time.time() - 90, blocks=3, nbytes=99, updated=2.0, problem=""
    )

    async def tell() -> None:
        await catalog.documents.put(here.document, here.pack(), 60)
        await cursor.tell(catalog.documents)

    asyncio.run(tell())
    document = json.loads(run(tmp_path, "catalog", "status", "--json").stdout)
    assert [(node["name"], node["api"], node["region"]) for node in document["nodes"]] == [
        ("gpu-1", "http://10.0.0.3:7070", "eu")
    ]
    assert [(one["source"], one["sequence"], one["blocks"]) for one in document["sources"]] == [("na", 7, 3)]
    shown = run(tmp_path, "catalog", "status").stdout
    assert "http://10.0.0.3:7070" in shown
    assert "2 min" in shown
    asyncio.run(catalog.close())
