"""Play a trace against a cache and count."""

from __future__ import annotations

from benchmarks.traces.baselines import Baseline
from benchmarks.traces.trace import Trace


def baseline_hits(trace: Trace, cache: Baseline) -> int:
    """Blocks hit: a block counts only when every block before it in its chain hits. Each request is then touched tail first,
    so that heads stay longest, and its misses are inserted."""
    depth = trace.depth.tolist()
    hits = 0
    for request in trace.requests:
        for block in request.blocks:
            if block not in cache:
                break
            hits += 1
        for block in reversed(request.blocks):
            cache.access(block, depth[block], request.time)
    return hits
