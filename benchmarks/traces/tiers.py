"""Two tiers with a timing model: what admission to disk costs in hits and saves in writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.traces.replay import Answers, Cache, Keyed
from benchmarks.traces.trace import ROOT
from kvstore.policy.admission import AdmissionPolicy, Mode, Target
from kvstore.policy.reuse import Reuse, Traffic

HOST_SHARE, DISK_SHARE = 0.05, 0.50
"""Of the unique blocks of the trace."""

BYTES_PER_TOKEN = 128 << 10
"""An 8B model with grouped queries, in bf16."""
PREFILL_TOKENS_PER_SECOND = 20_000.0
HOST_BYTES_PER_SECOND = 54e9
DISK_BYTES_PER_SECOND = 2e9
"""Measured on an H100 host: pinned memory, and a cloud disk."""


@dataclass
class Tally:
    """What a run of both tiers did, in blocks."""

    host_hits: int = 0
    disk_hits: int = 0
    host_writes: int = 0
    disk_writes: int = 0

    @property
    def hits(self) -> int:
        return self.host_hits + self.disk_hits

    def prefill_seconds_saved(self, block_tokens: int) -> float:
        """Prefill that the hits made unnecessary, less the time to load them. A load that is slower than prefill is not made."""
        nbytes = block_tokens * BYTES_PER_TOKEN
        prefill = block_tokens / PREFILL_TOKENS_PER_SECOND
        from_host = max(0.0, prefill - nbytes / HOST_BYTES_PER_SECOND)
        from_disk = max(0.0, prefill - nbytes / DISK_BYTES_PER_SECOND)
        return self.host_hits * from_host + self.disk_hits * from_disk


def run_tiers(source: Keyed, mode: Mode) -> Tally:
    """A host tier before a disk tier, both evicting by reuse. Blocks from disk are promoted.

    A block is offered to the disk when it is used, if it was used before, and when the host tier gives it up; it takes
    its ancestors along. With ``Mode.OFF`` everything is written at once.
    """
    unique = source.trace.unique
    traffic = Traffic()
    host, disk = (Cache(int(unique * share), Reuse(traffic)) for share in (HOST_SHARE, DISK_SHARE))
    admission = AdmissionPolicy(traffic, mode=mode)
    tally = Tally()
    number_of = {key: block for block, key in enumerate(source.keys)}
    parent = source.trace.parent.tolist()
    answers = Answers(source, traffic)
    for request in source.trace.requests:
        answers.until(request.time)
        answers.begin(request)
        chain = [source.keys[block] for block in request.blocks]
        headers = [source.headers[block] for block in request.blocks]
        traffic.observe(chain, request.time)
        for key in chain:
            if key in host.index:
                tally.host_hits += 1
            elif key in disk.index:
                tally.disk_hits += 1
            else:
                break
        tally.host_writes += sum(key not in host.index for key in chain)
        host.use(chain, headers, request.time)
        residence = disk.capacity * (request.time - source.trace.requests[0].time) / max(tally.host_writes, 1)
        if mode is Mode.OFF:
            wanted = len(chain)
        else:
            often = traffic.sightings(chain) >= 2
            wanted = int(np.flatnonzero(often)[-1]) + 1 if often.any() else 0
            for key in host.evicted:
                if (
                    key not in disk.index
                    and admission.admit(Target.DISK, [key], request.time, residence=residence)[0].admit
                ):
                    block = number_of[key]
                    above = []
                    while block != ROOT and source.keys[block] not in disk.index:
                        above.append(block)
                        block = parent[block]
                    above.reverse()
                    tally.disk_writes += len(above)
                    disk.use([source.keys[b] for b in above], [source.headers[b] for b in above], request.time)
        tally.disk_writes += sum(key not in disk.index for key in chain[:wanted])
        disk.use(chain[:wanted], headers[:wanted], request.time)
    return tally
