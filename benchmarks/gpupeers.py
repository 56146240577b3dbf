"""How others bring a rig's pages to the host, for the study ``gpu``: torch, vLLM's offloading, LMCache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu import Rig

PAGE_TOKENS = 16
CHUNK_TOKENS = 256
"""LMCache's usual chunk."""


def offloads(rig: Rig, host: Any) -> dict[str, Callable[[], None]]:
    """By name: brings the pages of the rig's first batch to the pinned tensor ``host`` and waits. Only what is installed."""
    found: dict[str, Callable[[], None]] = {"torch_offload": lambda: torch_save(rig, host)}
    if (swap := vllm_swap()) is not None:
        copies = vllm_copies(rig, host)
        found["vllm_offload"] = lambda: _finish(lambda: swap(*copies, False))
    if (kernels := lmcache_kernels()) is not None:
        found |= lmcache_saves(rig, host, kernels)
    return found


def torch_save(rig: Rig, host: Any) -> None:
    """Torch alone: one index per layer and half, then one copy to pinned memory."""
    import torch

    block = rig.geometry.block
    for copy in rig.batches[0]:
        ids = torch.tensor(copy.pages, device="cuda")
        rows = [plane[ids].flatten(0, 1) for half in rig.pages.planes for plane in half]
        moved = torch.stack(rows).view(block.kv, block.layers, block.tokens, -1, block.head_dim).permute(0, 3, 2, 1, 4)
        host[: rig.geometry.share].copy_(moved.contiguous().view(torch.uint8).view(-1), non_blocking=True)
    torch.cuda.synchronize()


def vllm_swap() -> Any:
    """vLLM's own batch of copies between GPU and host; None where its kernels are not installed."""
    import torch

    with suppress(ImportError):
        importlib.import_module("vllm._custom_ops")
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None)


def vllm_copies(rig: Rig, host: Any) -> tuple[Any, Any, Any]:
    """The same pages as vLLM's offloading copies them, one piece a page and layer: source, target, bytes of each."""
    import torch

    nbytes = rig.caches[0][0].nbytes
    sources = [cache.data_ptr() + page * nbytes for page in _pages(rig) for cache in rig.caches]
    targets = range(host.data_ptr(), host.data_ptr() + len(sources) * nbytes, nbytes)
    return torch.tensor(sources), torch.tensor(targets), torch.full((len(sources),), nbytes)


def lmcache_kernels() -> Any:
    """LMCache's CUDA operators; None where they are not installed, or built for another torch."""
    with suppress(ImportError):
        return importlib.import_module("lmcache.c_ops")
    return None


def lmcache_saves(rig: Rig, host: Any, kernels: Any) -> dict[str, Callable[[], None]]:
    """LMCache's two ways: a kernel that writes to pinned memory, and one that fills a buffer on the GPU that is copied.

    The bytes of a page are read as vLLM's FlashAttention lays them out: K of all its tokens, then V (MLA: latents).
    """
    import torch

    block = rig.geometry.block
    heads = rig.geometry.heads[1] - rig.geometry.heads[0]
    width = heads * block.head_dim
    order = kernels.EngineKVFormat.NL_X_NB_TWO_BS_NH_HS if block.kv == 2 else kernels.EngineKVFormat.NL_X_NB_BS_HS
    device = rig.caches[0].device
    layers = torch.tensor([cache.data_ptr() for cache in rig.caches], dtype=torch.int64, device=device)
    pages = torch.tensor(_pages(rig), device=device)
    slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()
    shape = (block.kv, block.layers, CHUNK_TOKENS, width)
    count = len(slots) // CHUNK_TOKENS
    chunks = host.view(torch.bfloat16)[: count * block.kv * block.layers * CHUNK_TOKENS * width].view(count, *shape)
    buffer = torch.empty(shape, dtype=torch.bfloat16, device=device)

    def gather(target: Any, chunk: int) -> None:
        part = slots[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
        tokens = rig.caches[0].shape[0] * PAGE_TOKENS
        out = kernels.TransferDirection.D2H
        kernels.multi_layer_kv_transfer(
            target, layers, part, device, tokens, out, order, block_size=PAGE_TOKENS, head_size=block.head_dim
        )

    def straight() -> None:
        for chunk in range(count):
            gather(chunks[chunk], chunk)

    def buffered() -> None:
        for chunk in range(count):
            gather(buffer, chunk)
            chunks[chunk].copy_(buffer, non_blocking=True)

    for way in (straight, buffered):
        chunks.zero_()
        _finish(way)
        first = pages[: CHUNK_TOKENS // PAGE_TOKENS]
        wanted = torch.stack([cache[first].view(-1, block.kv, PAGE_TOKENS, width) for cache in rig.caches])
        if not torch.equal(chunks[0].to(device), wanted.permute(2, 0, 1, 3, 4).reshape(shape)):
            raise RuntimeError(f"LMCache's {way.__name__} way moved other bytes")
    return {
        "lmcache_offload": lambda: _finish(straight),
        "lmcache_buffered_offload": lambda: _finish(buffered),
    }


def _pages(rig: Rig) -> list[int]:
    return [page for copy in rig.batches[0] for page in copy.pages]


def _finish(work: Callable[[], object]) -> None:
    """Enqueue on a stream of its own, and wait."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    torch.cuda.synchronize()
