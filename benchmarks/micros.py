"""Costs of single operations, with pytest-benchmark: ``python -m pytest benchmarks/micros.py``.

They guide work on the code; what the project claims are the studies.
"""

from __future__ import annotations

import os
import random
import time

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore.envelope import Header, crc32c, payload, verify
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.index import BlockIndex
from kvstore.layout import BlockLayout
from kvstore.node.protocol import FrameDecoder, encode, join_keys, split_keys
from kvstore.policy.eviction import LRU, eviction_order
from kvstore.policy.hotness import Hotness
from kvstore.policy.reuse import Reuse, Traffic
from kvstore.store import contained, runs_of
from kvstore.testing.blocks import random_block
from kvstore.tiers.base import Medium

CHAIN = [BlockKey(os.urandom(16)) for _ in range(2048)]
NAMESPACE = Namespace(
    model="m", weights="1", dtype="bfloat16", layers=32, kv_heads=8, head_dim=128, attention="gqa", rope="",
    block_tokens=64, layout="canonical:kv_head_token_layer",
)  # fmt: skip


def test_keys_of_128k_tokens(benchmark: BenchmarkFixture) -> None:
    tokens = np.random.default_rng(1).integers(0, 128_000, 128 << 10).astype(np.uint32)
    keyring = NAMESPACE.keyring(b"secret")
    assert len(benchmark(lambda: keyring.block_keys(chain_digests(tokens, 64)))) == 2048


def test_longest_prefix_of_2048_blocks_over_three_tiers(benchmark: BenchmarkFixture) -> None:
    held = [
        (Medium.HOST, dict.fromkeys(CHAIN[:500]).keys()),
        (Medium.DISK, dict.fromkeys(CHAIN[:1500]).keys()),
        (Medium.OBJECT, dict.fromkeys(CHAIN).keys()),
    ]

    def runs() -> int:
        return len(runs_of(((medium, contained(CHAIN, keys)) for medium, keys in held), len(CHAIN)))

    assert benchmark(runs) == 3


def test_a_lookup_through_the_codec(benchmark: BenchmarkFixture) -> None:
    def there() -> int:
        (message,) = FrameDecoder().feed(encode([1, "lookup", {"keys": join_keys(CHAIN), "start": 0}]))
        return len(split_keys(message[2]["keys"]))

    assert benchmark(there) == 2048


def test_checksum_of_8_mib(benchmark: BenchmarkFixture) -> None:
    data = np.random.default_rng(1).bytes(8 << 20)
    assert benchmark(crc32c, data)


def test_verify_an_envelope_of_8_mib(benchmark: BenchmarkFixture) -> None:
    block = random_block(random.Random(1), 8 << 20)
    assert benchmark(verify, block.envelope, block.key).crc == crc32c(payload(block.envelope, 8 << 20))


def test_runs_of_a_rank(benchmark: BenchmarkFixture) -> None:
    layout = BlockLayout(tokens=64, layers=80, kv_heads=8, head_dim=128, itemsize=2)
    assert len(benchmark(layout.runs, heads=(3, 4), tokens=(16, 32))) == 2


def indexed(blocks: int) -> BlockIndex:
    index = BlockIndex()
    parent = NO_PARENT
    for number in range(blocks):
        key = BlockKey(os.urandom(16))
        header = Header(
            key=key, namespace=b"n" * 16, parent=parent, index=number % 256, tokens=64, length=8 << 20, crc=0
        )
        index.add(header, number << 23, time.time())
        parent = key if number % 256 < 255 else NO_PARENT
    return index


def test_rank_100k_blocks_by_recency(benchmark: BenchmarkFixture) -> None:
    index = indexed(100_000)
    assert len(benchmark(eviction_order, index, LRU(), index.used(), time.time())) == 100_000


def test_rank_100k_blocks_by_reuse(benchmark: BenchmarkFixture) -> None:
    index, traffic = indexed(100_000), Traffic()
    traffic.observe(CHAIN, time.time())
    assert len(benchmark(eviction_order, index, Reuse(traffic), index.used(), time.time())) == 100_000


def test_observe_a_request_of_2048_blocks(benchmark: BenchmarkFixture) -> None:
    traffic, hotness = Traffic(), Hotness()

    def observe() -> None:
        now = time.time()
        traffic.observe(CHAIN, now)
        hotness.observe(CHAIN, now, 64, 8 << 20)

    benchmark(observe)
