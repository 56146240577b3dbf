"""Chooses the pager for the device that the engine's pages are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from connectors.paging.base import Pager
from connectors.paging.parted import Part, PartedPager
from connectors.vllm.keys import Geometry
from kvstore.errors import ConfigError


def make_pagers(
    kv_caches: Mapping[str, torch.Tensor], pages: int, geometry: Geometry, rank: int
) -> tuple[Pager, Pager | None]:
    """Pagers for ``pages`` engine pages in ``kv_caches``: of blocks, and of states where there are some. Call it in the engine's
    thread.

    Raises ConfigError or IdentityError when the caches are not what the geometry says.
    """
    device = next(iter(kv_caches.values())).device
    if geometry.layouts:
        pager, states = _cuda_pagers(kv_caches, geometry, rank)
    elif device.type == "cpu":
        pager, states = _cpu_pagers(kv_caches, pages, geometry, rank)
    else:
        raise ConfigError("device", device.type, "there is no pager for it", "Run vLLM on CUDA or on a CPU.")
    if pager.block_bytes != geometry.block_bytes:
        raise ConfigError("kv_caches", pager.block_bytes, f"a block has {geometry.block_bytes} bytes", "Report this.")
    if states is not None and geometry.states and states.block_bytes != geometry.states.block_bytes:
        expected = geometry.states.block_bytes
        raise ConfigError("kv_caches", states.block_bytes, f"a state has {expected} bytes", "Report this.")
    return pager, states


def _cpu_pagers(
    kv_caches: Mapping[str, torch.Tensor], pages: int, geometry: Geometry, rank: int
) -> tuple[Pager, Pager | None]:
    from connectors.paging.torch import OpaquePager

    layers = {name: kv_caches[name] for part in geometry.sections for name in part.layers}
    tables = [table for part in geometry.sections for table in part.tables]
    pager = OpaquePager(layers, pages, geometry.pages_per_block, rank, geometry.ranks, tables)
    if (states := geometry.states) is None:
        return pager, None
    recurrent = {name: kv_caches[name] for name in states.layers}
    return pager, OpaquePager(recurrent, pages, 1, rank, states.ranks, states.tables)


def _cuda_pagers(kv_caches: Mapping[str, torch.Tensor], geometry: Geometry, rank: int) -> tuple[Pager, Pager | None]:
    """One pager for each part of a block, and one for states, which share the device memory that staging may take."""
    from connectors.paging.cuda import CudaPager
    from connectors.paging.geometry import vllm_pages

    states = geometry.states
    sharers = len(geometry.layouts) + (states is not None)
    parts = []
    for section, layout in zip(geometry.sections, geometry.layouts, strict=True):
        used = sorted(set(section.tables))
        caches = [kv_caches[name] for name in section.layers]
        tables = tuple(used.index(table) for table in section.tables)
        views = vllm_pages(caches, layout, geometry.page_tokens, tables)
        pager = CudaPager(views, layout, layout.rank_heads(rank, geometry.ranks), sharers)
        parts.append(Part(pager, tuple(used)))
    blocks = parts[0].pager if len(parts) == 1 else PartedPager(parts)
    if states is None:
        return blocks, None
    layout = states.layout
    views = vllm_pages([kv_caches[name] for name in states.layers], layout, 1, states.tables)
    return blocks, CudaPager(views, layout, layout.rank_heads(rank, states.ranks), sharers)
