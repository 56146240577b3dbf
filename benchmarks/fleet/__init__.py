"""Planning beyond one machine: what 3 to 50 regions and thousands of nodes cost, and where the design bends.

Nothing here runs a thousand nodes. Three things are put together:

* Costs of single operations, measured in this run: the server's time for the catalog's scripts on a real Redis, and the time of
  the code that merges snapshots, makes, reads and plans manifests.
* A region: what its nodes ask of these, by the intervals that they really keep. The catalog's load, the network of its server,
  what its publisher reads. It bends where a server's core is 70% busy.
* A fleet: regions that each ask for prompts of their own and for prompts that all ask for, played minute by minute: what
  nodes learn and report, manifests and plans are the product's; the link is a number of bytes per minute. What has to be
  sent, how much of it comes through, how long after it was first stored anywhere, and how much of it is asked for: what
  reads on demand would move if nothing were sent ahead.

A node is what makes the traffic of the conversation trace: 3.4 requests a second. A quarter of their blocks are asked for
again and so get to the bucket: 100 a second, of 64 tokens.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from benchmarks.fleet.sim import BLOCK_BYTES, LABELS, NAMESPACE, Fleet, Played
from benchmarks.study import Study
from kvstore.burials import POLL_SECONDS
from kvstore.catalog.base import BATCH, START, Cursor
from kvstore.catalog.redis import RedisCatalog, RedisSettings
from kvstore.catalog.sharing import DUTY_SECONDS, FOLLOW_SECONDS
from kvstore.demand import REPORT_SECONDS
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.blocks import random_key
from kvstore.testing.catalog import random_entries
from kvstore.testing.redis import redis_server
from kvstore.tiers.object.hotness import MOST_RANKED, HotnessSnapshot, merged
from replication.contents import DELETED_AT_ONCE
from replication.hotset import MOST_BLOCKS
from replication.manifest import HotBlock, Manifest, read_trusted
from replication.planner import Limits, plan

NODES = (10, 30, 100, 300, 1000, 3000)
REGIONS = (3, 10, 30, 50)
REQUESTS_PER_SECOND = 3.4
"""Of a node; the blocks of a request are recorded in one call."""
BUSY = 0.7
"""Of one core, from which a server's queue grows."""
PUBLISH_SECONDS, PULL_SECONDS = 60.0, 30.0
"""Defaults of the region's service."""
WAITS = REPORT_SECONDS / 2 + PULL_SECONDS / 2
"""Seconds that a block waits, on average, for its node's next report and for the next pull; the rest is played."""
DELETE_SECONDS = 0.1
"""Assumed of one request that deletes ``DELETED_AT_ONCE`` objects."""
PURGED = 1_000_000
CHANGE_BYTES = 70
"""Of one change on the wire: key, packed entry, framing."""
BATCHES = 40
MANIFEST_BLOCKS = 50_000
NAMED = MOST_RANKED / 8
"""Blocks of a full report: of those ranked, 11% are hotter than what continues them where chains are as in the conversation
trace."""


def arguments(parser: Any) -> None:
    parser.add_argument("--blocks-per-second", type=float, default=100.0, help="that a node stores in the bucket")
    parser.add_argument("--minutes", type=int, default=10, help="that the fleet is played (default: %(default)s)")
    parser.add_argument("--link", type=float, default=1000.0, help="MB/s into a region (default: %(default)s)")


async def catalog_costs() -> dict[str, float]:
    """Server time of the catalog's scripts, in microseconds."""
    costs: dict[str, float] = {}
    source = random.Random(1)
    with redis_server(append_only=False) as server, server.client() as client:
        catalog = await RedisCatalog.open(RedisSettings(url=server.url), "s3://bucket")

        def spent() -> float:
            stats = client.info("commandstats").get("cmdstat_evalsha", {"usec": 0.0})
            client.config_resetstat()
            return float(stats["usec"])

        begin = Cursor((await catalog.follow(START)).cursor.epoch, 0, None)
        spent()
        for _ in range(BATCHES):
            await catalog.record(random_entries(source, BATCH))
        costs["record_us"] = spent() / BATCHES / BATCH
        cursor, seen = begin, 0
        while seen < BATCHES * BATCH:
            batch = await catalog.follow(cursor)
            cursor, seen = batch.cursor, seen + len(batch.changes)
        costs["follow_us"] = spent() / seen
        for _ in range(BATCHES):
            await catalog.follow(cursor)
        costs["idle_follow_us"] = spent() / BATCHES
        for number in range(BATCHES):
            await catalog.claim(f"node/{number}", "study", 15.0)
        costs["claim_us"] = spent() / BATCHES
        await catalog.close()
    return costs


def manifest_costs() -> dict[str, float]:
    """Processor time of a region's code per block, in microseconds, and bytes."""
    source = random.Random(2)
    keys = [random_key(source) for _ in range(MANIFEST_BLOCKS)]
    blocks = [
        HotBlock(key, keys[number - 1] if number % 20 else NO_PARENT, NAMESPACE, BLOCK_BYTES, 0.0, source.random())
        for number, key in enumerate(keys)
    ]
    manifest = Manifest(region="r", sequence=1, published=0.0, labels=LABELS, blocks=blocks)
    secret = Ed25519PrivateKey.generate()
    report = HotnessSnapshot(0.0, 3600.0, {block.key: block.score for block in blocks})
    costs = {}

    def timed(name: str, started: float) -> None:
        costs[name] = (time.process_time() - started) / MANIFEST_BLOCKS * 1e6

    started = time.process_time()
    sealed = manifest.sealed(secret)
    timed("seal_us", started)
    costs["manifest_bytes"] = len(sealed) / MANIFEST_BLOCKS
    started = time.process_time()
    read = read_trusted(sealed)
    timed("read_us", started)
    have: set[BlockKey] = {block.key for block in blocks[: MANIFEST_BLOCKS // 2]}
    started = time.process_time()
    plan(read.blocks, read.labels, have, Limits())
    timed("plan_us", started)
    packed = report.pack()
    costs["report_bytes"] = len(packed) / MANIFEST_BLOCKS
    started = time.process_time()
    merged([HotnessSnapshot.unpack(packed)], 0.0)
    timed("merge_us", started)
    return costs


def region(nodes: int, stored: float, costs: Mapping[str, float]) -> dict[str, float]:
    """What ``nodes`` of one region ask of its catalog and its publisher, by second unless said."""
    calls = nodes * (1 / FOLLOW_SECONDS + 1 / DUTY_SECONDS + REQUESTS_PER_SECOND)
    recorded, told = nodes * stored, nodes * nodes * stored
    busy = (
        nodes * costs["idle_follow_us"] / FOLLOW_SECONDS
        + nodes * costs["claim_us"] / DUTY_SECONDS
        + recorded * costs["record_us"]
        + told * costs["follow_us"]
    ) / 1e6
    return {
        "commands": calls,
        "recorded": recorded,
        "told": told,
        "busy": busy,
        "megabytes": told * CHANGE_BYTES / 1e6,
        "start_seconds": nodes * 1e6 * costs["follow_us"] / 1e6,
        "report_megabytes": nodes * NAMED * costs["report_bytes"] / 1e6 / REPORT_SECONDS,
        "merge_seconds": nodes * NAMED * costs["merge_us"] / 1e6,
    }


def most_nodes(stored: float, costs: Mapping[str, float]) -> int:
    """How many nodes one catalog bears."""
    low, high = 1, 100_000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if region(middle, stored, costs)["busy"] <= BUSY else (low, middle - 1)
    return low


def pulling(regions: int, blocks: int, costs: Mapping[str, float]) -> tuple[float, float]:
    """Bytes per second that a region reads of manifests, and the share of a core that reading and planning takes."""
    sources = regions - 1
    size = blocks * costs["manifest_bytes"]
    return sources * size / PULL_SECONDS, sources * blocks * (costs["read_us"] + costs["plan_us"]) / 1e6 / PULL_SECONDS


def show(console: Console, stored: float, costs: Mapping[str, float], played: Mapping[int, Played]) -> None:
    table = Table("nodes", title=f"one region, {stored:.0f} blocks stored per node and second", title_justify="left")
    headings = ("commands/s", "keys/s in", "keys/s out", "cores of Redis", "MB/s out", "all start: s", "reports MB/s")
    for heading in (*headings, "merge s"):
        table.add_column(heading, justify="right")
    for nodes in NODES:
        load = region(nodes, stored, costs)
        table.add_row(f"{nodes:,}", *(f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in load.values()))
    console.print(table)
    table = Table("regions", title="a fleet in which all pull from all", title_justify="left")
    headings = ("offered MB/s", "copied MB/s", "asked for MB/s", "hot seconds copied %", "lag s, median")
    for heading in (*headings, "lag s, worst tenth", "manifests MB/s (full)", "cores to read and plan (full)"):
        table.add_column(heading, justify="right")
    for regions, one in played.items():
        nbytes, cores = pulling(regions, MOST_BLOCKS, costs)
        sizes = (one.offered_megabytes, one.copied_megabytes, one.asked_megabytes)
        values = (*sizes, 100 * one.share, WAITS + one.lag, WAITS + one.late)
        table.add_row(str(regions), *(f"{value:,.0f}" for value in values), f"{nbytes / 1e6:,.1f}", f"{cores:.2f}")
    console.print(table)


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True, width=140)
    costs = {**asyncio.run(catalog_costs()), **manifest_costs()}
    played = {count: Fleet(count, args.link * 1e6).play(args.minutes) for count in REGIONS}
    stored = args.blocks_per_second
    show(console, stored, costs, played)
    figures = {f"cost_{name}": value for name, value in costs.items()}
    for nodes in (100, 1000):
        load = region(nodes, stored, costs)
        figures |= {
            f"catalog_cores_{nodes}_nodes": load["busy"],
            f"catalog_megabytes_per_s_{nodes}_nodes": load["megabytes"],
        }
        figures[f"merge_seconds_{nodes}_nodes"] = load["merge_seconds"]
        figures[f"start_all_seconds_{nodes}_nodes"] = load["start_seconds"]
    figures["most_nodes_per_catalog"] = most_nodes(stored, costs)
    figures["most_nodes_per_catalog_tenth_of_writes"] = most_nodes(stored / 10, costs)
    figures["full_manifest_megabytes"] = MOST_BLOCKS * costs["manifest_bytes"] / 1e6
    figures["purge_seconds_of_a_million_blocks"] = (
        PUBLISH_SECONDS + PULL_SECONDS + POLL_SECONDS + PURGED / DELETED_AT_ONCE * DELETE_SECONDS
    )
    for count, one in played.items():
        nbytes, cores = pulling(count, MOST_BLOCKS, costs)
        figures |= {
            f"manifest_megabytes_per_s_{count}_regions": nbytes / 1e6,
            f"pull_cores_{count}_regions": cores,
            f"wan_megabytes_per_s_{count}_regions": one.copied_megabytes,
            f"asked_megabytes_per_s_{count}_regions": one.asked_megabytes,
            f"hot_seconds_copied_percent_{count}_regions": 100 * one.share,
            f"lag_s_{count}_regions": WAITS + one.lag,
        }
    return figures


STUDY = Study(
    name="fleet",
    summary="3 to 50 regions and thousands of nodes: what the catalog, manifests and links bear",
    run=run,
    targets={"most_nodes_per_catalog": ">=30"},
    arguments=arguments,
)
