"""Chooses the pager for the device that the engine's pages are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from connectors.paging.base import Pager
from connectors.paging.parted import Part, PartedPager
from connectors.vllm.keys import Geometry
from kvstore.errors import ConfigError


def make_pager(kv_caches: Mapping[str, torch.Tensor], pages: int, geometry: Geometry, rank: int) -> Pager:
    """Pager for ``pages`` engine pages in ``kv_caches``. Call it in the engine's thread.

    Raises ConfigError or IdentityError when the caches are not what the geometry says.
    """
    device = next(iter(kv_caches.values())).device
    pager: Pager
    if geometry.layouts:
        pager = _cuda_pager(kv_caches, geometry, rank)
    elif device.type == "cpu":
        from connectors.paging.torch import OpaquePager

        layers = {name: kv_caches[name] for part in geometry.sections for name in part.layers}
        tables = [table for part in geometry.sections for table in part.tables]
        pager = OpaquePager(layers, pages, geometry.pages_per_block, rank, geometry.ranks, tables)
    else:
        raise ConfigError("device", device.type, "there is no pager for it", "Run vLLM on CUDA or on a CPU.")
    if pager.block_bytes != geometry.block_bytes:
        raise ConfigError("kv_caches", pager.block_bytes, f"a block has {geometry.block_bytes} bytes", "Report this.")
    return pager


def _cuda_pager(kv_caches: Mapping[str, torch.Tensor], geometry: Geometry, rank: int) -> Pager:
    """One pager for each part of a block, which share the device memory that staging may take."""
    from connectors.paging.cuda import CudaPager
    from connectors.paging.geometry import vllm_pages

    parts = []
    for section, layout in zip(geometry.sections, geometry.layouts, strict=True):
        used = sorted(set(section.tables))
        caches = [kv_caches[name] for name in section.layers]
        tables = tuple(used.index(table) for table in section.tables)
        views = vllm_pages(caches, layout, geometry.page_tokens, tables)
        heads = layout.rank_heads(rank, geometry.ranks)
        pager = CudaPager(views, layout, heads, len(geometry.layouts))
        parts.append(Part(pager, tuple(used)))
    return parts[0].pager if len(parts) == 1 else PartedPager(parts)
