"""Three regions with real vLLM engines: what one computed, the others load before they ever compute, token for token.

Each region has an S3 server, a Redis and a node of its own; eu and ap are reached over links of a WAN's latency, bandwidth and
loss. float32: bfloat16 is not reproducible between chunk sizes even without a store.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import ask, cpu_engine
from kvstore.identity import BlockKey
from kvstore.testing.model import make_model
from kvstore.testing.node import alter_host_blocks, wait_for
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.testing.servers import S3Server, ServerUnavailable, ministack
from kvstore.testing.shaping import Shape
from replication.testing import LocalRegion, LocalRegions

pytestmark = [pytest.mark.engine, pytest.mark.s3, pytest.mark.timeout(600)]

OUTPUT = 16
BLOCK_TOKENS = 64
ENGINE = {"max_model_len": 2048, "num_gpu_blocks_override": 200}
NODE = [
    "identity.secret=a secret of all the regions",
    "policy.planner=off", "policy.prefetch=wait_complete",  # so small a model may be computed faster than it is loaded
    "host.bytes=96MiB", "host.extent_bytes=8MiB", "disk.bytes=128MiB", "disk.segment_bytes=32MiB",
]  # fmt: skip
WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow", "window"]


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


SYSTEM = prose(0, 500)
PROMPTS = [SYSTEM + prose(seed, 150) for seed in (1, 2)] + [prose(3, 600)]


class World:
    """na computes; eu and ap are born empty. eu is sent what is hot, ap reads it on demand.

    Engines start together, and join when they are first asked.
    """

    def __init__(self, stack: ExitStack, folder: Path, servers: Sequence[tuple[S3Server, RedisServer]]) -> None:
        self.model = make_model(folder / "model", PROMPTS)
        self.regions = stack.enter_context(LocalRegions(folder))
        self.catalogs: dict[str, RedisServer] = {}
        self.engines: dict[str, EngineProcess] = {}
        self._stack = stack
        for name, (s3, catalog) in zip(("na", "eu", "ap"), servers, strict=True):
            self.catalogs[name] = catalog
            on_demand = [f"region.topology={folder / name / 'regions.toml'}", "region.name=ap", "remote.mode=enforce"]
            more = on_demand if name == "ap" else []
            self.regions.add(name, s3, *NODE, f"catalog.url={catalog.url}", *more)
        self.regions.flow("na", "eu", Shape(0.02, 12e6, loss=0.005))
        self.regions.flow("na", "ap", Shape(0.08, 6e6, loss=0.01), "max_bytes = 0")
        for name in ("na", "eu", "ap"):
            stack.enter_context(self[name].node)
            self.start_engine(name)

    def __getitem__(self, name: str) -> LocalRegion:
        return self.regions.regions[name]

    def start_engine(self, name: str) -> None:
        region = self[name]
        engine = cpu_engine(self.model, region.folder / "engine.log", region.node.socket, threads=1, **ENGINE)
        self.engines[name] = self._stack.enter_context(engine)

    def ask(self, name: str) -> tuple[list[list[int]], list[dict[str, int]]]:
        """Every prompt, one by one: the tokens, and by tier how many of the prompt's came from the store."""
        self.engines[name].ready()
        wait_for(lambda: self[name].node.clients() == 2)
        replies = [ask(self.engines[name], prompt, OUTPUT) for prompt in PROMPTS]
        return [reply.tokens for reply in replies], [reply.loaded for reply in replies]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs-")))
        try:
            servers = [(stack.enter_context(ministack()), stack.enter_context(redis_server())) for _ in range(3)]
        except ServerUnavailable as error:
            pytest.skip(str(error))
        yield World(stack, folder, servers)


@pytest.fixture(scope="module")
def reference(world: World) -> list[list[int]]:
    """What na's engine computed, with nothing to load; it is published then."""
    tokens, loaded = world.ask("na")
    assert loaded[0] == loaded[2] == {}
    assert len({tuple(answer) for answer in tokens}) == len(PROMPTS), "the model must tell the prompts apart"
    world["na"].node.drain()
    assert world["na"].publish()["blocks"] == world["na"].node.blocks()["object"] > 0
    return tokens


def whole(tokens: dict[str, int]) -> int:
    return sum(tokens.values())


def test_a_region_that_is_born_skips_prefill_from_its_first_request(world: World, reference: list[list[int]]) -> None:
    region, blocks = world["eu"], world["na"].node.blocks()["object"]
    assert set(region.node.blocks().values()) == {0}
    with region.service():
        wait_for(lambda: region.node.blocks()["object"] == blocks)  # the node hears of each block by the catalog
    assert region.warm()["status"] == 0
    tokens, loaded = world.ask("eu")
    assert tokens == reference
    assert all(set(one) == {"host"} and whole(one) >= 9 * BLOCK_TOKENS for one in loaded), loaded
    assert region.node.blocks() == {"host": blocks, "disk": blocks, "object": blocks}, "nothing was computed anew"


def test_what_a_cut_link_did_not_bring_is_computed(world: World, reference: list[list[int]]) -> None:
    """The cut is in the middle of what the last prompt's blocks take to read."""
    region, blocks = world["ap"], world["na"].node.blocks()["object"]
    link, engine = region.links["na"], world.engines["ap"]
    assert region.replicate()["flows"][0]["planned"]["blocks"] == 0
    wait_for(lambda: region.node.blocks()["remote"] == blocks)
    assert sum(region.node.blocks().values()) == blocks, "all of it is elsewhere"
    engine.ready()
    wait_for(lambda: region.node.clients() == 2)
    size = next(tier for tier in region.node.status()["tiers"] if tier["medium"] == "remote")["used_bytes"] // blocks
    before, rate = link.bytes_down, link.shape.bytes_per_second
    link.shape.bytes_per_second = 2 * size
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask, engine, PROMPTS[2], OUTPUT)
        wait_for(lambda: link.bytes_down - before > 4 * size)
        assert not asked.done()
        link.cut()
        reply = asked.result()
    assert reply.tokens == reference[2]
    assert whole(reply.loaded) < 9 * BLOCK_TOKENS, reply.loaded
    assert engine.counters()["vllm:kvstore_blocks_missed{unavailable}"] > 0
    link.reset()
    link.shape.bytes_per_second = rate
    link.heal()
    region.node.drain()
    region.node.stop()  # so the next test need not wait until the node tries the link again
    region.node.start()


def test_what_nobody_sent_ahead_is_read_where_it_was_computed(world: World, reference: list[list[int]]) -> None:
    region, blocks = world["ap"], world["na"].node.blocks()["object"]
    wait_for(lambda: region.node.blocks()["remote"] == blocks)
    tokens, loaded = world.ask("ap")
    assert tokens == reference
    assert all(whole(one) >= 9 * BLOCK_TOKENS for one in loaded), loaded
    assert set(loaded[0]) == {"remote"}
    assert loaded[1]["host"] > loaded[1]["remote"] > 0, "of the prompt that both begin with nothing is read twice"
    region.node.drain()
    assert region.node.blocks()["object"] == blocks, "the next reader finds it in the region's own bucket"


def test_altered_kv_alters_the_answers(world: World, reference: list[list[int]]) -> None:
    """The control: were wrong KV loaded, these tests would see it."""
    with world["ap"].node.client() as client:
        assert alter_host_blocks(client)
    tokens, loaded = world.ask("ap")
    assert all(map(whole, loaded))
    assert not any(answer == expected for answer, expected in zip(tokens, reference, strict=True))


def test_a_damaged_block_is_computed_and_healed(world: World, reference: list[list[int]]) -> None:
    region = world["eu"]
    lose_disk(region)
    with region.node.client() as client:
        blocks = client.call("list", medium="object", limit=100)["blocks"]
        bad = next(block for block in blocks if block["index"] == 3)
        region.damage(bytes(bad["namespace"]), BlockKey(bytes(bad["key"])))
    tokens, loaded = world.ask("eu")
    assert tokens == reference
    assert world.engines["eu"].counters()["vllm:kvstore_blocks_missed{corrupt}"] > 0
    assert min(map(whole, loaded)) == 3 * BLOCK_TOKENS, loaded
    region.node.drain()
    lose_disk(region)
    tokens, loaded = world.ask("eu")
    assert tokens == reference
    assert min(map(whole, loaded)) >= 9 * BLOCK_TOKENS, loaded


def lose_disk(region: LocalRegion) -> None:
    """Start the node anew with nothing but its bucket; return when it knows that again."""
    stored = region.node.blocks()["object"]
    region.node.stop()
    shutil.rmtree(region.node.data)
    region.node.start()
    wait_for(lambda: region.node.blocks()["object"] == stored)


def test_everything_is_restarted(world: World, reference: list[list[int]]) -> None:
    world.engines["eu"].close()
    stored = {name: world[name].node.blocks()["object"] for name in ("na", "eu")}
    for name in ("na", "eu"):
        world[name].node.kill()
        world[name].s3.stop()
        with world.catalogs[name].client() as redis:
            redis.flushall()
        world.catalogs[name].kill()
    for name in ("na", "eu"):
        world.catalogs[name].restart()
        world[name].s3.restart()
        world[name].node.start()
        wait_for(lambda name=name: world[name].node.blocks()["object"] == stored[name])
    world.start_engine("eu")
    world["na"].publish()
    said = world["eu"].replicate()
    assert (said["status"], said["flows"][0]["planned"]["blocks"]) == (0, 0)
    tokens, loaded = world.ask("eu")
    assert tokens == reference
    assert min(map(whole, loaded)) >= 9 * BLOCK_TOKENS, loaded
