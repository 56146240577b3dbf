"""Chooses the pager for the device that the engine's pages are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from connectors.paging.base import Pager
from connectors.vllm.keys import Geometry
from kvstore.errors import ConfigError


def make_pager(kv_caches: Mapping[str, torch.Tensor], pages: int, geometry: Geometry, rank: int) -> Pager:
    """Pager for ``pages`` engine pages in ``kv_caches``. Raises ConfigError when they are not what the geometry says."""
    device = next(iter(kv_caches.values())).device.type
    if device != "cpu":
        raise ConfigError("device", device, "no pager for this device", "Run vLLM on a CPU.")
    from connectors.paging.torch import OpaquePager

    pager = OpaquePager(kv_caches, pages, geometry.pages_per_block, rank, geometry.ranks)
    if pager.block_bytes != geometry.block_bytes:
        raise ConfigError("kv_caches", pager.block_bytes, f"blocks have {geometry.block_bytes} bytes", "This is a bug.")
    return pager
