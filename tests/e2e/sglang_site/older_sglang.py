"""What SGLang before 0.5.23 needs more on a CPU: it gives out the slots of its pages in Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Kernel:
    """Called as a Triton kernel is: ``kernel[grid](...)``."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run


def allocate_on_a_cpu(paged: Any) -> None:
    """Replace the kernels of a module with SGLang's paged allocator. A newer one has a way of its own."""
    if hasattr(paged, "alloc_decode_naive") or not hasattr(paged, "alloc_decode_kernel"):
        return

    def extend(prefix: Any, lengths: Any, last: Any, free_pages: Any, out: Any, batch: int, page_size: int) -> None:
        paged.alloc_extend_naive(prefix, lengths, last, free_pages, out, page_size, "cpu")

    def decode(lengths: Any, last: Any, free_pages: Any, out: Any, batch: int, page_size: int) -> None:
        full = (lengths - 1) % page_size == 0
        out.copy_(last + 1)
        out[full] = free_pages[: int(full.sum())] * page_size

    paged.alloc_extend_kernel, paged.alloc_decode_kernel = _Kernel(extend), _Kernel(decode)
