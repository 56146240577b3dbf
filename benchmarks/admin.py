"""The admin API under load beside a node at work: what 500 reads per second of the API cost saves, loads and lookups.

The node and the client that drives it share the first core; APIs and load generators have the second one, as they would run on
cores that engines leave free. A busy second core alone slows the first one: the two may be threads of one physical core, and they
share caches and memory. So the load of one round goes to the API of the node that is measured, and in another to the API of a
second node that holds the same and serves nobody else. The ratio of the two is what the API's questions cost a node; the ratio
to a round without any load is told too. The three kinds of round alternate, each in each place, so all meet the same moments of
the machine. What a read of the API costs the node's process in processor time is counted besides, while nobody else asks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.node import chain, namespace, node_process
from benchmarks.study import Study
from kvstore.node.client import Client
from kvstore.testing.node import wait_for
from kvstore.testing.servers import free_port

READS_PER_SECOND = 500
CONNECTIONS = 8
ROUNDS = 30
HOST_BYTES = 1 << 30
BLOCK_BYTES = 8 << 20
BATCH = 8
LOOKED_UP = 1024
ALONE_SECONDS = 5.0
"""How long the API is asked while the node has nothing else to do, to count what it costs the node's process."""
LOOKUPS = 1000
"""In a round, with one save and one load of a batch after each hundred: about a second."""

VARIANTS = 64
"""Different blocks and prompts that are asked about: no answer about them is kept for the next one."""
PROMPT_TOKENS = 1024

READS = [
    ("GET", "/v1/status", None),
    ("GET", "/v1/tiers", None),
    ("GET", "/readyz", None),
    ("GET", "/v1/snapshot", None),
    ("GET", "/v1/namespaces", None),
    ("GET", "/v1/hot", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/policy", None),
    ("GET", "/v1/blocks?tier=host&limit=20", None),
]
"""What dashboards, probes and scrapers ask; beside them, as often as each, one block and what a router would find of a prompt."""


def reads(keys: Sequence[bytes], tokens: Sequence[int], digest: bytes) -> list[tuple[str, str, object]]:
    """In turn."""
    wanted: list[tuple[str, str, object]] = []
    for number in range(VARIANTS):
        prompt = {"namespace": digest.hex(), "tokens": [*tokens[: PROMPT_TOKENS - 1], number]}
        wanted += [*READS, ("GET", f"/v1/blocks/{keys[number].hex()}", None), ("POST", "/v1/lookup", prompt)]
    return wanted


def run(args: Any) -> Mapping[str, float]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this study needs two cores")
    before = os.sched_getaffinity(0)
    with _site(cores[0], cores[1]) as (work, asked), _site(cores[1], cores[1]) as (_, control):
        os.sched_setaffinity(0, {cores[0]})
        try:
            return _measure(work, asked, control)
        finally:
            os.sched_setaffinity(0, before)


@contextmanager
def _site(node_core: int, api_core: int) -> Iterator[tuple[Work, Generator]]:
    """A node with blocks in it, its API on another core, and load for that API."""
    port = free_port()
    with node_process(HOST_BYTES, f"api.listen=127.0.0.1:{port}") as socket, Client(socket, name="study") as client:
        wait_for(lambda: _ready(port))
        node = int(client.call("status")["pid"])
        _pin(node, node_core)
        _pin(_child(node), api_core)
        work = Work(client, node)
        with Generator(port, api_core, work.reads) as load:
            yield work, load


def _measure(work: Work, asked: Generator, control: Generator) -> dict[str, float]:
    work.round()  # touches every slot and page
    idle: list[dict[str, float]] = []
    beside: list[dict[str, float]] = []
    under: list[dict[str, float]] = []
    kinds = deque([(idle, None), (beside, control), (under, asked)])
    for _ in range(ROUNDS):
        for rounds, load in kinds:
            with nullcontext() if load is None else load.running():
                rounds.append(work.round())
        kinds.rotate()  # what warms up or cools down in a turn is spread over all kinds
    if failed := asked.failed + control.failed:
        raise SystemExit(f"{failed} reads of the API failed")
    asked_alone = _cpu_seconds(work.node)
    with asked.running():
        time.sleep(ALONE_SECONDS)
    asked_alone = _cpu_seconds(work.node) - asked_alone
    every = ("lookup", "save", "load")
    return {
        "data_path_slowdown": _slowdown(beside, under, every),
        **{f"{part}_slowdown": _slowdown(beside, under, [part]) for part in every},
        "slowdown_to_idle_machine": _slowdown(idle, under, every),
        "busy_core_slowdown": _slowdown(idle, beside, every),
        "node_cpu_share": asked_alone / ALONE_SECONDS,
        "lookup_1024_us": 1e6 * statistics.median(one["lookup"] for one in idle) / LOOKUPS,
        "api_reads_per_second": statistics.median(asked.rates),
        "api_read_ms": statistics.median(asked.milliseconds),
    }


def _slowdown(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], parts: Sequence[str]
) -> float:
    """Median over the rounds."""
    rounds = zip(before, after, strict=True)
    return statistics.median(sum(b[part] for part in parts) / sum(a[part] for part in parts) for a, b in rounds)


class Work:
    """What engines do: lookups of a long chain; saves of new blocks, loads of these."""

    def __init__(self, client: Client, node: int) -> None:
        """``node``: the process."""
        self.node = node
        self._client = client
        looked_up = namespace("looked up")
        blocks = chain(client, looked_up, 1024, LOOKED_UP, seed=1)
        client.reserve(looked_up, blocks)
        self._looked_up = [block.key for block in blocks]
        client.commit(self._looked_up)
        tokens = np.random.default_rng(1).integers(0, 128_000, LOOKED_UP * looked_up.block_tokens)  # those of the chain
        self.reads = reads(self._looked_up, tokens.tolist(), looked_up.digest)
        self._saved = namespace("saved")
        self._seed = 2
        self._engine = np.random.default_rng(0).integers(0, 255, BLOCK_BYTES, dtype=np.uint8)
        client.arena.populate()
        self._arena = np.frombuffer(client.arena.buffer, dtype=np.uint8)

    def round(self) -> dict[str, float]:
        """Seconds that each kind took together."""
        spent = {"lookup": 0.0, "save": 0.0, "load": 0.0}
        for number in range(LOOKUPS):
            started = time.perf_counter()
            found = self._client.lookup(self._looked_up, timeout=5.0)
            spent["lookup"] += time.perf_counter() - started
            assert found.blocks == LOOKED_UP
            if number % 100 == 0:
                self._save_and_load(spent)
        return spent

    def _save_and_load(self, spent: dict[str, float]) -> None:
        self._seed += 1
        blocks = chain(self._client, self._saved, BLOCK_BYTES, BATCH, self._seed)
        keys = [block.key for block in blocks]
        started = time.perf_counter()
        for offset in self._client.reserve(self._saved, blocks).offsets:
            assert offset is not None
            np.copyto(self._arena[offset : offset + BLOCK_BYTES], self._engine)
        assert len(self._client.commit(keys)) == BATCH
        saved = time.perf_counter()
        acquired = self._client.acquire(keys, 5.0)
        for offset in acquired.offsets:
            np.copyto(self._engine, self._arena[offset : offset + BLOCK_BYTES])
        self._client.release(keys)
        assert len(acquired.offsets) == BATCH
        spent["save"] += saved - started
        spent["load"] += time.perf_counter() - saved


class Generator:
    """Sends the reads at a steady pace from a process of its own; a context manager that ends it."""

    def __init__(self, port: int, core: int, wanted: Sequence[object]) -> None:
        self.rates: list[float] = []
        self.milliseconds: list[float] = []
        self.failed = 0
        arguments = [str(port), str(core), str(READS_PER_SECOND), str(CONNECTIONS)]
        program = Path(__file__).with_name("httpload.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(json.dumps(wanted))

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load while the block lasts."""
        self._say("go")
        yield
        told = json.loads(self._say("stop"))
        self.rates.append(told["per_second"])
        self.milliseconds.append(told["median_ms"])
        self.failed += told["failed"]

    def _say(self, word: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    except httpx.TransportError:
        return False


def _child(pid: int) -> int:
    children: Sequence[str] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def _cpu_seconds(pid: int) -> float:
    """Of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _pin(pid: int, core: int) -> None:
    """Every thread of a process; those that it starts later inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


STUDY = Study(
    name="admin",
    summary="Lookups, saves and loads of a node beside 500 reads a second of its admin API, against without",
    run=run,
    targets={"data_path_slowdown": "<1.05", "api_reads_per_second": ">=490"},
)
