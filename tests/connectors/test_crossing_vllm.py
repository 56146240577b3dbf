"""vLLM's own caches hold what a block says: vLLM places and allocates them, in every layout it knows, for every rank.

Each rank's pages give its share of the canonical bytes, and take it; so what any rank of any degree saved, any other loads, here
and in SGLang, whose own pools are held to the same bytes (``tests/e2e/sglang/crossing.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from connectors.paging.base import BlockCopy
from connectors.paging.geometry import vllm_pages
from connectors.paging.reference import ReferencePager
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

DEGREES = (1, 2, 4, 8)
OFFSET = 4096
PAGE, PAGES_OF_BLOCK, PAGES = 8, 2, 7
LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]
DTYPE = torch.bfloat16
GQA, FEW, MLA = (
    BlockLayout(
        tokens=PAGE * PAGES_OF_BLOCK, layers=len(LAYERS), kv_heads=heads, head_dim=16, itemsize=2, kv=kv, order=order
    )
    for heads, kv, order in ((8, 2, "kv_head_token_layer"), (2, 2, "kv_head_token_layer"), (1, 1, "token_layer"))
)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20, epoch=1)
    yield arena
    arena.close()


def allocated(block: BlockLayout, heads: int, layout: KVCacheLayout, kernel_tokens: int) -> list[torch.Tensor]:
    """A cache for each layer, by vLLM."""
    spec: FullAttentionSpec = (
        MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=block.head_dim, dtype=DTYPE)
        if block.kv == 1
        else FullAttentionSpec(block_size=PAGE, num_kv_heads=heads, head_size=block.head_dim, dtype=DTYPE)
    )
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout, num_gpu_blocks_override=None, prefix_cache_retention_interval=None
    )
    config = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
    room = spec.page_size_bytes * len(LAYERS) * PAGES
    placed = get_kv_cache_config_from_groups(config, [KVCacheGroupSpec(LAYERS, spec)], room)
    assert placed.num_blocks == PAGES
    caches = allocate_kv_cache(placed, torch.device("cpu"), layout, [kernel_tokens])
    return [caches[layer] for layer in LAYERS]


def halves(cache: torch.Tensor, block: BlockLayout) -> tuple[torch.Tensor, ...]:
    """``[page, token, head, dim]`` of K and V, as vLLM's FlashAttention takes its cache apart; or of the latents."""
    return cache.transpose(1, 2).split(block.head_dim, dim=-1)


def tokens_of(caches: list[torch.Tensor], block: BlockLayout, pages: list[int]) -> torch.Tensor:
    """``[kv, head, token, layer, dim]`` of a block in those pages."""
    layers = []
    for cache in caches:
        split = cache.shape[0] // PAGES
        rows = [page * split + part for page in pages for part in range(split)]
        layers.append(torch.stack([half[rows].flatten(0, 1).transpose(0, 1) for half in halves(cache, block)]))
    return torch.stack(layers, dim=3)


DENSE = [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC]
"""Where vLLM may cut a page into smaller ones for its kernels."""
PAGED = [(layout, PAGE) for layout in KVCacheLayout] + [(layout, PAGE // 2) for layout in DENSE]


@pytest.mark.parametrize(("layout", "kernel_tokens"), PAGED, ids=[f"{layout.name}-{n}" for layout, n in PAGED])
@pytest.mark.parametrize("block", [GQA, FEW, MLA], ids=["gqa", "more-ranks-than-heads", "mla"])
def test_every_ranks_pages_hold_its_share(
    arena: Arena, block: BlockLayout, layout: KVCacheLayout, kernel_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (block.kv, block.kv_heads, block.tokens, block.layers, block.head_dim)
    truth = torch.randint(0, 1 << 15, shape, generator=generator, dtype=torch.int16).view(DTYPE)
    canonical = truth.contiguous().view(torch.uint8).numpy().tobytes()
    pages = [5, 2]
    for degree in DEGREES:
        saved = bytearray(block.nbytes)
        for rank in range(degree):
            heads = block.rank_heads(rank, degree) if block.kv == 2 else (0, 1)
            caches = allocated(block, heads[1] - heads[0], layout, kernel_tokens)
            share = truth[:, slice(*heads)]
            pager = ReferencePager(vllm_pages(caches, block, PAGE), block, heads)

            arena.slot(OFFSET, block.nbytes)[:] = canonical
            pager.load(arena, [BlockCopy(tuple(pages), OFFSET)]).wait()
            assert torch.equal(bits(tokens_of(caches, block, pages)), bits(share))
            others = [page for page in range(PAGES) if page not in pages]
            assert not bits(tokens_of(caches, block, others)).any()

            arena.slot(OFFSET, block.nbytes)[:] = saved
            pager.save(arena, [BlockCopy(tuple(pages), OFFSET)]).wait()
            saved[:] = arena.slot(OFFSET, block.nbytes)
        assert bytes(saved) == canonical, f"the ranks of degree {degree} together"


def bits(values: torch.Tensor) -> torch.Tensor:
    """To be compared bit for bit, NaN or not."""
    return values.contiguous().view(torch.int16)
