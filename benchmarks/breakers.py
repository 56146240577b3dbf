"""Prefix breakers: what the report finds of what is known to be there, what moving the part gives, and what it all costs.

Made traffic: a system prompt with a date in it, before a handbook that all prompts share; so it is known how many tokens would
be shared. The RAGPulse trace (``--trace``): its ids as pieces; the third block of each prompt is moved to the end, as the
report suggests, and prompts are compared again; and once more with the other blocks ordered by how often they occur.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import Study
from benchmarks.traces import TRACES
from kvstore.policy.breakers import Prompt, Report, find_breakers
from kvstore.policy.content import Pieces, pieces

PROMPTS = 512
SYSTEM, DATE, HANDBOOK, QUESTION = 300, 12, 3000, 100
ROUNDS = 9
SECRET = b"a secret of a tenant"


def made() -> list[list[int]]:
    source = np.random.default_rng(1)

    def text(tokens: int) -> list[int]:
        drawn: list[int] = source.integers(0, 128_000, tokens).tolist()
        return drawn

    system, handbook = text(SYSTEM), text(HANDBOOK)
    return [[*system, *text(DATE), *handbook, *text(QUESTION)] for _ in range(PROMPTS)]


def of_trace(path: Path) -> list[list[int]]:
    """The ids of each prompt in prompt order, which is that of the row's own fields."""
    rows = [json.loads(line)["hash_ids"] for line in path.read_text().splitlines() if line.strip()]
    return [[part for parts in row.values() for part in parts] if isinstance(row, dict) else row for row in rows]


def compare(prompts: list[list[int]]) -> Report:
    """Each id is a piece of its own."""

    def whole(ids: list[int]) -> Pieces:
        hashes = b"".join(blake2b(str(one).encode(), digest_size=8).digest() for one in ids)
        return Pieces(np.arange(len(ids), dtype=np.uint32), np.frombuffer(hashes, dtype="<u8"), len(ids))

    return find_breakers([Prompt(str(at), whole(ids)) for at, ids in enumerate(prompts)], least=1)


def milliseconds(work: Callable[[], object]) -> float:
    samples = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples)


def run(args: Any) -> Mapping[str, float]:
    traffic = made()
    long = list(chain.from_iterable(traffic))[: 128 * 1024]
    prompts = [Prompt(str(at), pieces(ids, SECRET)) for at, ids in enumerate(traffic)]
    (breaker,) = find_breakers(prompts).breakers
    figures = {
        "found_of_shareable": breaker.shareable / (HANDBOOK * (PROMPTS - 1)),
        "tokens_off": float(SYSTEM - breaker.token),
        "report_ms_512_prompts": milliseconds(lambda: find_breakers(prompts)),
        "pieces_ms_4k_tokens": milliseconds(lambda: pieces(traffic[0] + traffic[1][: 4096 - len(traffic[0])], SECRET)),
        "pieces_ms_128k_tokens": milliseconds(lambda: pieces(long, SECRET)),
    }
    if args.trace.exists():
        ids = of_trace(args.trace)
        before = compare(ids)
        moved = [[*prompt[:2], *prompt[3:], *prompt[2:3]] for prompt in ids]
        after = compare(moved)
        often = Counter(chain.from_iterable(moved))
        ordered = compare([[*prompt[:2], *sorted(prompt[2:], key=lambda one: (-often[one], one))] for prompt in moved])
        figures |= {
            "trace_by_prefix_percent": 100 * before.by_prefix / before.tokens,
            "trace_anywhere_percent": 100 * before.anywhere / before.tokens,
            "trace_part_to_move_blocks": float(before.breakers[0].breaking),
            "trace_shareable_percent": 100 * sum(b.shareable for b in before.breakers) / before.tokens,
            "trace_by_prefix_after_moving_percent": 100 * after.by_prefix / after.tokens,
            "trace_by_prefix_after_ordering_percent": 100 * ordered.by_prefix / ordered.tokens,
        }
    return figures


def arguments(parser: argparse.ArgumentParser) -> None:
    default = TRACES / "ragpulse" / "0_trace.jsonl"
    parser.add_argument("--trace", type=Path, default=default, help="RAGPulse's trace (default: %(default)s)")


STUDY = Study(
    name="breakers",
    summary="Prefix breakers: found of what is there, gained by moving the part, and the cost",
    run=run,
    targets={"found_of_shareable": ">=0.95", "report_ms_512_prompts": "<1000", "pieces_ms_4k_tokens": "<2"},
    arguments=arguments,
)
