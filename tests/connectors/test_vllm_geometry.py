"""Which rank writes what of a block: every head once, whatever the degree; latents by one rank for all."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from connectors.vllm.keys import Geometry
from kvstore.identity import Namespace
from kvstore.layout import BlockLayout


def geometry(kv_heads: int, ranks: int, mla: bool = False) -> Geometry:
    layout = BlockLayout(
        tokens=64, layers=2, kv_heads=kv_heads, head_dim=8, itemsize=2, kv=1 if mla else 2,
        order="token_layer" if mla else "kv_head_token_layer",
    )  # fmt: skip
    space = Namespace(
        model="m", weights="1", dtype="bfloat16", layers=2, kv_heads=kv_heads, head_dim=8, attention="mla" if mla else "gqa",
        rope="", block_tokens=64, layout=layout.name,
    )  # fmt: skip
    return Geometry(space, 16, ranks, layout.nbytes, (layout,))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_ranks_write_every_head_once(kv_heads: int, ranks: int) -> None:
    shape = geometry(kv_heads, ranks)
    writers = [rank for rank in range(ranks) if shape.share(rank).part is not None]
    assert [shape.share(rank).part for rank in writers] == list(range(shape.parts))
    written = [head for rank in writers for head in range(*shape.layouts[0].rank_heads(rank, ranks))]
    assert written == list(range(kv_heads))
    assert shape.page_bytes(0) * shape.pages_per_block * shape.parts == shape.block_bytes


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_one_rank_writes_latents_and_all_read_them(ranks: int) -> None:
    shape = geometry(1, ranks, mla=True)
    assert [rank for rank in range(ranks) if shape.share(rank).part is not None] == [0]
    assert {shape.layouts[0].rank_heads(rank, ranks) for rank in range(ranks)} == {(0, 1)}
    assert shape.parts == 1
