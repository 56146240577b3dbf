"""The best that is possible: a cache that knows the future."""

from __future__ import annotations

import heapq

from benchmarks.traces.trace import Trace


def belady_hits(trace: Trace, capacity: int) -> int:
    """Hit blocks of the cache that never keeps a block without a next use and gives up the furthest next use first,
    the deepest block among equals."""
    never = len(trace.requests)
    coming = [never] * trace.unique
    following: list[list[int]] = [[] for _ in trace.requests]
    for number in range(never - 1, -1, -1):
        blocks = trace.requests[number].blocks
        following[number] = [coming[block] for block in blocks]
        for block in blocks:
            coming[block] = number
    depth = trace.depth.tolist()
    next_use: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = 0
    for request, nexts in zip(trace.requests, following, strict=True):
        for block in request.blocks:
            if block not in next_use:
                break
            hits += 1
        for block, use in zip(reversed(request.blocks), reversed(nexts), strict=True):
            if use == never:
                next_use.pop(block, None)
                continue
            next_use[block] = use
            heapq.heappush(heap, (-use, -depth[block], block))
            while len(next_use) > capacity:
                furthest, _, victim = heapq.heappop(heap)
                if next_use.get(victim) == -furthest:
                    del next_use[victim]
    return hits
