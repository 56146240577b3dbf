"""What a router pays to learn where a prompt of 128k tokens would find most of itself.

``lookup_128k_ms`` is what a router beside a node pays: from token ids in an array (numpy uint32) to usable tokens and seconds of
each tier. In it: finding the prompt among those seen lately and comparing it token by token, the block keys, the request through
the socket to a node process whose host and disk tiers hold all 2,048 blocks, the node's walk over both indices, its estimates
and the answer. Not in it: tokenizing; HTTP; hashing, since the prompt's beginning was seen, all of it but the last two blocks,
which are new in every round. Blocks have 1 KiB: indices are asked, no block is read.

Beside it, in the same rounds and in changing order: ``cold_ms``, where nothing is remembered and all is hashed; ``peek_ms``, the
node alone, with keys in hand; ``engine_lookup_ms``, what an engine's own lookup of these keys takes; ``http_json_ms``, the public
API asked with token ids as JSON by the Python client, its parsing and checking of 128k numbers included; ``http_packed_ms``, the
same with the ids as bytes in hexadecimal; ``http_keys_ms``, what peers ask each other: keys over HTTP, for a router that derives
keys itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np

from benchmarks.node import namespace, node_process
from benchmarks.study import Study
from kvstore.admin.client import AdminClient
from kvstore.admin.models.prompts import Prompt
from kvstore.identity import NO_PARENT
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.node.protocol import split_keys
from kvstore.promptkeys import PromptKeys
from kvstore.testing.node import wait_for
from kvstore.testing.servers import free_port
from kvstore.tiers.base import Medium

BLOCKS = 2048
NEW = 2
"""Blocks at the end that were never seen."""
BLOCK_BYTES = 1024
ROUNDS = 50


def run(args: Any) -> Mapping[str, float]:
    api = f"127.0.0.1:{free_port()}"
    disk = ["disk.enabled=true", "disk.bytes=64MiB", "disk.segment_bytes=4MiB"]
    with node_process(64 << 20, *disk, f"api.listen={api}") as socket, Client(socket, name="study") as client:
        wait_for(lambda: _answers(f"http://{api}/readyz"))
        with AdminClient(f"http://{api}") as admin, httpx.Client(base_url=f"http://{api}") as http:
            return _measure(client, admin, http)


def _measure(client: Client, admin: AdminClient, http: httpx.Client) -> dict[str, float]:
    space = namespace("router")
    keyring = client.open_namespace(space, BLOCK_BYTES)
    source = np.random.default_rng(1)
    tokens = source.integers(0, 128_000, BLOCKS * space.block_tokens).astype(np.uint32)
    keys = split_keys(PromptKeys().keys(tokens, space.block_tokens, keyring))
    client.reserve(space, [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)])
    assert len(client.commit(keys, durable=Medium.DISK, timeout=60)) == BLOCKS

    known = PromptKeys()
    held = (BLOCKS - NEW) * space.block_tokens

    def peek(joined: bytes) -> int:
        found = client.call("peek", 5.0, keys=joined)["tiers"]
        assert [tier[0] for tier in found] == ["host", "disk"]
        return int(min(tier[1] for tier in found)) * space.block_tokens

    def over_http() -> int:
        answer = admin.router_lookup([Prompt(namespace="router", tokens=turn.tolist())])
        return min(tier.usable_tokens for tier in answer.prompts[0].nodes[0].tiers)

    def packed_over_http() -> int:
        answer = admin.router_lookup([Prompt(namespace="router", packed_tokens=turn.astype("<u4").tobytes())])
        return min(tier.usable_tokens for tier in answer.prompts[0].nodes[0].tiers)

    def keys_over_http() -> int:
        answer = http.post("/v1/router/peek", json={"chains": [joined.hex()]}).json()
        return int(answer["chains"][0][0]["usable_blocks"]) * space.block_tokens

    ways: dict[str, Callable[[], int]] = {
        "lookup_128k_ms": lambda: peek(known.keys(turn, space.block_tokens, keyring)),
        "cold_ms": lambda: peek(PromptKeys().keys(turn, space.block_tokens, keyring)),
        "peek_ms": lambda: peek(joined),
        "engine_lookup_ms": lambda: client.lookup(split_keys(joined), timeout=5.0).blocks * space.block_tokens,
        "http_json_ms": over_http,
        "http_packed_ms": packed_over_http,
        "http_keys_ms": keys_over_http,
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    known.keys(tokens, space.block_tokens, keyring)
    order = list(ways)
    for _ in range(ROUNDS):
        order.append(order.pop(0))
        turn = tokens.copy()
        turn[held:] = source.integers(128_000, 256_000, len(turn) - held)
        joined = PromptKeys().keys(turn, space.block_tokens, keyring)
        for name in order:
            started = time.perf_counter()
            found = ways[name]()
            samples[name].append((time.perf_counter() - started) * 1e3)
            assert found == held, name
    figures = {name: statistics.median(each) for name, each in samples.items()}
    return {**figures, "lookup_128k_ms_p95": sorted(samples["lookup_128k_ms"])[int(ROUNDS * 0.95)]}


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


STUDY = Study(
    name="router",
    summary="Where a 128k-token prompt would find most of itself, for a router beside a node",
    run=run,
    targets={"lookup_128k_ms": "<2"},
)
