"""The region's catalog: 500 keys a call, and how soon a block saved on one node is listed on another."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.node import chain, namespace, node_process
from benchmarks.study import Study
from kvstore.catalog import Catalog
from kvstore.catalog.base import BATCH, START, Cursor
from kvstore.catalog.follower import Follower
from kvstore.catalog.publisher import Publisher
from kvstore.catalog.redis import RedisCatalog, RedisSettings
from kvstore.catalog.sqlite import SQLiteCatalog
from kvstore.identity import BlockKey
from kvstore.node.client import Client
from kvstore.testing.catalog import random_entries
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.object.objects import Objects

ROUNDS = 200
SAVES = 30
BLOCK_BYTES = 1 << 20
SCOPE = "s3://bucket"


def arguments(parser: Any) -> None:
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the catalog (default: %(default)s)")


def run(args: Any) -> Mapping[str, float]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs-")))
        server = stack.enter_context(redis_server(append_only=False))
        figures = asyncio.run(index_figures(server, folder, args.blocks))
        with server.client() as client:
            client.flushall()
        return {**figures, **sharing_figures(server, folder)}


async def index_figures(server: RedisServer, folder: Path, blocks: int) -> dict[str, float]:
    """Calls on an index of ``blocks`` blocks, beside a plain client that asks the same server for the same keys."""
    redis = await RedisCatalog.open(RedisSettings(url=server.url), SCOPE)
    catalogs: dict[str, Catalog] = {"": redis, "sqlite_": await SQLiteCatalog.open(folder / "catalog.db", SCOPE)}
    figures: dict[str, float] = {}
    source = random.Random(1)
    keys: list[BlockKey] = []
    filling = dict.fromkeys(catalogs, 0.0)
    for _ in range(blocks // BATCH):
        entries = random_entries(source, BATCH)
        keys += entries
        for name, catalog in catalogs.items():
            filling[name] += await seconds(catalog.record(entries))
    for name, catalog in catalogs.items():
        figures[f"{name}record_500_ms"] = filling[name] / (blocks // BATCH) * 1e3
        figures[f"{name}start_s"] = await seconds(start(catalog, folder, len(keys)))
    samples: dict[str, list[float]] = {name: [] for name in ("plain_", *catalogs)}
    with server.client() as client:
        figures["redis_mb"] = client.info("memory")["used_memory"] / 1e6
        figures["idle_follow_server_us"] = await idle_us(server, redis)
        for _ in range(ROUNDS):
            wanted = source.sample(keys, BATCH)
            started = time.perf_counter()
            client.hmget(redis.names[1], wanted)
            samples["plain_"].append(time.perf_counter() - started)
            for name, catalog in catalogs.items():
                samples[name].append(await seconds(catalog.lookup(wanted)))
    for catalog in catalogs.values():
        await catalog.close()
    lookups = {f"{name}lookup_500_ms": statistics.median(taken) * 1e3 for name, taken in samples.items()}
    return figures | lookups | {"lookup_speed_of_plain": lookups["plain_lookup_500_ms"] / lookups["lookup_500_ms"]}


async def seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def start(catalog: Catalog, folder: Path, blocks: int) -> None:
    """A node that starts with a complete catalog fills its index."""
    settings = ObjectSettings(url=f"file://{folder}/empty")
    tier = ObjectTier(Objects.connect(settings), settings)
    await Follower(catalog, tier, Publisher(catalog), 1 << 30).catch_up()
    assert len(tier.keys()) == blocks
    await tier.close()


async def idle_us(server: RedisServer, catalog: Catalog) -> float:
    """The server's CPU time for one round of a node that has nothing to tell and to learn."""
    cursor = (await catalog.follow(START)).cursor
    cursor = Cursor(cursor.epoch, cursor.since, None)
    with server.client() as client:
        client.config_resetstat()
        for _ in range(ROUNDS):
            await catalog.follow(cursor)
        return float(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])


def sharing_figures(server: RedisServer, folder: Path) -> dict[str, float]:
    """Two nodes on one bucket: from the moment a save is durable on the first until the second lists the block."""
    settings = [f"object.url=file://{folder}/bucket", f"catalog.url={server.url}"]
    visible: dict[str, list[float]] = {"visible_ms": [], "visible_when_asked_ms": []}
    space = namespace("sharing")
    with ExitStack() as stack:
        writer, reader = (
            stack.enter_context(Client(stack.enter_context(node_process(256 << 20, *settings)))) for _ in range(2)
        )
        reader.open_namespace(space, BLOCK_BYTES)
        for number in range(SAVES):
            for asks, name in enumerate(visible):
                (block,) = chain(writer, space, BLOCK_BYTES, 1, seed=2 * number + asks)
                writer.reserve(space, [block])
                assert writer.commit([block.key], durable=Medium.OBJECT, timeout=30.0) == (block.key,)
                started = time.perf_counter()
                while not (
                    reader.lookup([block.key], timeout=5.0).blocks
                    if asks
                    else reader.call("inspect", key=block.key)["media"]
                ):
                    time.sleep(0.001)
                visible[name].append((time.perf_counter() - started) * 1e3)
                time.sleep(0.05 * random.random())  # at any moment of the reader's rounds
    worst = {f"{name}_max": max(taken) for name, taken in visible.items()}
    return {name: statistics.median(taken) for name, taken in visible.items()} | worst


STUDY = Study(
    name="catalog",
    summary="The catalog of a region: 500 keys a call, and how soon nodes see each other's blocks",
    run=run,
    targets={
        "lookup_500_ms": "<=2",
        "lookup_speed_of_plain": ">=0.6",
        "visible_ms": "<=1000",
        "visible_ms_max": "<=1000",
    },
    arguments=arguments,
)
