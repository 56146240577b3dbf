"""Block keys of a 128k-token prompt: what every lookup pays before it leaves the engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.study import Study
from kvstore.identity import Namespace, chain_digests

TOKENS = 128 * 1024
ROUNDS = 30


def run(args: Any) -> Mapping[str, float]:
    namespace = Namespace(
        model="llama-3-8b", weights="1", dtype="bfloat16", layers=32, kv_heads=8, head_dim=128, attention="gqa", rope="",
        block_tokens=64, layout="canonical:kv_head_token_layer",
    )  # fmt: skip
    keyring = namespace.keyring(b"secret")
    tokens = np.random.default_rng(1).integers(0, 128_000, TOKENS).astype(np.uint32)
    as_list = tokens.tolist()

    def milliseconds(prompt: Any) -> float:
        samples = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            keyring.block_keys(chain_digests(prompt, namespace.block_tokens))
            samples.append((time.perf_counter() - started) * 1e3)
        return statistics.median(samples)

    return {"ms_128k_tokens": milliseconds(tokens), "ms_128k_tokens_from_list": milliseconds(as_list)}


STUDY = Study(
    name="hashing",
    summary="Block keys of a 128k-token prompt (64-token blocks), one core",
    run=run,
    targets={"ms_128k_tokens": "<5"},
)
