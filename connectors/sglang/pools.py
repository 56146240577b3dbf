"""Which prefix of a prompt a hybrid model can use, when other pools must hold something for it besides KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolTransferResult

_HAS_RESTORABLE = "restorable_prefix_pages" in PoolTransferResult.__dataclass_fields__


def limits(transfer: Any) -> bool:
    """Whether a prefix is of no use without what this pool must hold for it."""
    return transfer.hit_policy in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES)


def usable_prefix(kv_pages: int, transfers: Sequence[Any], held: Mapping[str, Sequence[bool]]) -> PoolTransferResult:
    """``held`` says, by pool, of which of the first ``kv_pages`` pages it has something.

    A pool with policy ALL_PAGES must have every page of the prefix; one with TRAILING_PAGES, whose state stands for all tokens
    before it, the last ones (as many as the transfer has keys). Pools with any other policy decide nothing, and nothing is said
    of them.
    """
    lengths = list(range(1, kv_pages + 1))
    hits = {"kv": kv_pages} if kv_pages else {}
    for transfer in filter(limits, transfers):
        pages = held[str(transfer.name)]
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            span = max(1, len(transfer.keys or ()))
            good = {length for length in range(1, kv_pages + 1) if all(pages[max(0, length - span) : length])}
        else:
            good = set(range(1, next((at for at, there in enumerate(pages) if not there), kv_pages) + 1))
        hits[transfer.name] = max(good, default=0)
        lengths = [length for length in lengths if length in good]
    found = {name: pages for name, pages in hits.items() if pages}
    usable = lengths[-1] if lengths else 0
    if _HAS_RESTORABLE:
        return PoolTransferResult(usable, found, lengths)
    return PoolTransferResult(usable, found)
