"""Traces that no constant was chosen on: parts and distortions of the given ones, and made ones with known shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.traces.trace import Request, Trace, build

Row = tuple[float, list[Any], int, int]


def _row(request: Request, time: float) -> Row:
    return time, list(request.blocks), request.input_tokens, request.output_tokens


def halves(trace: Trace) -> list[Trace]:
    """Both halves by requests, each starting with nothing."""
    middle = len(trace.requests) // 2
    parts = trace.requests[:middle], trace.requests[middle:]
    return [
        build(f"{trace.name}, half {number}", [_row(request, request.time) for request in part])
        for number, part in enumerate(parts, 1)
    ]


def scaled(trace: Trace, factor: float) -> Trace:
    """All times longer by a factor."""
    return build(f"{trace.name}, time x {factor:g}", [_row(r, r.time * factor) for r in trace.requests])


def session(request: Request) -> int:
    """What a request belongs to: requests that share their second block (their first, where there is no second; the first is
    often one system prompt for all)."""
    return request.blocks[min(1, len(request.blocks) - 1)]


def sampled(trace: Trace, requests: int, seed: int = 5) -> Trace:
    """Whole sessions, drawn at random, with about so many requests."""
    sessions = sorted({session(request) for request in trace.requests})
    share = min(requests / len(trace.requests), 1.0)
    drawn = {
        name
        for name, draw in zip(sessions, np.random.default_rng(seed).random(len(sessions)), strict=True)
        if draw < share
    }
    return build(trace.name, [_row(request, request.time) for request in trace.requests if session(request) in drawn])


def shuffled(trace: Trace, seed: int = 1) -> Trace:
    """Sessions start in another order; inside a session nothing changes."""
    sessions: dict[int, list[Request]] = defaultdict(list)
    for request in trace.requests:
        sessions[session(request)].append(request)
    starts = np.array([session[0].time for session in sessions.values()])
    moved = np.random.default_rng(seed).permutation(starts)
    rows = [
        _row(request, request.time + new - old)
        for session, old, new in zip(sessions.values(), starts.tolist(), moved.tolist(), strict=True)
        for request in session
    ]
    return build(f"{trace.name}, shuffled", rows)


def agents(requests: int = 3000, seed: int = 2) -> Trace:
    """Agents under one system prompt: short gaps, many turns, a prompt that grows by a block or two each turn."""
    source = np.random.default_rng(seed)

    def rows() -> Iterator[Row]:
        made = session = 0
        start = 0.0
        while made < requests:
            start += source.exponential(8.0)
            session += 1
            time, length = start, 4 + int(source.integers(0, 8))
            for _ in range(1 + int(source.geometric(0.12))):
                yield (
                    time,
                    ["s", *(f"{session}/{i}" for i in range(length))],
                    512 * length,
                    int(source.integers(20, 400)),
                )
                time += 2.0 + source.exponential(15.0)
                length += int(source.integers(1, 3))
                made += 1

    return build("made: agents", rows())


def documents(requests: int = 3000, seed: int = 3) -> Trace:
    """Questions on documents of Zipf popularity whose order of popularity changes half-way."""
    source = np.random.default_rng(seed)
    lengths = source.integers(5, 60, 400)

    def rows() -> Iterator[Row]:
        for number in range(requests):
            document = (int(source.zipf(1.2)) + (0 if number < requests // 2 else 137)) % 400
            chain = [f"{document}/{i}" for i in range(int(lengths[document]))]
            yield number * 0.7, [*chain, f"question {number}"], 512 * len(chain), 50

    return build("made: documents", rows())


def scans(requests: int = 3000, seed: int = 4) -> Trace:
    """A third conversations, two thirds long prompts that never come back."""
    source = np.random.default_rng(seed)
    talks = agents(requests // 3, seed)

    def rows() -> Iterator[Row]:
        for request in talks.requests:
            yield _row(request, request.time)
        last = talks.requests[-1].time
        for number in range(requests * 2 // 3):
            length = int(source.integers(20, 50))
            yield float(source.uniform(0, last)), [f"x{number}/{i}" for i in range(length)], 512 * length, 200

    return build("made: scans", rows())


def loop(requests: int = 2000) -> Trace:
    """One period after the other asks for the same 50 prompts: what recency is worst at."""
    rows = [(number * 1.0, [f"{number % 50}/{i}" for i in range(20)], 512 * 20, 100) for number in range(requests)]
    return build("made: loop", rows)


def all_of(trace: Trace) -> list[Trace]:
    return [*halves(trace), scaled(trace, 0.1), scaled(trace, 10.0), shuffled(trace)]


def made(requests: int) -> list[Trace]:
    return [agents(requests), documents(requests), scans(requests), loop(requests)]
