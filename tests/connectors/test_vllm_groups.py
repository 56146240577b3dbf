"""KV cache groups: the parts of a block do not depend on how vLLM grouped its layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from connectors.paging.base import ABSENT
from connectors.vllm.groups import PageTables, describe, page_tables, sections
from connectors.vllm.plan import Load
from kvstore.identity import BlockKey

FULL = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, sliding_window=512)


def group(spec: Any, layers: list[int]) -> Any:
    return SimpleNamespace(kv_cache_spec=spec, layer_names=[f"model.layers.{layer}.self_attn.attn" for layer in layers])


def test_layers_are_in_the_models_order_whatever_the_groups() -> None:
    groups = [group(WINDOW, [10, 2, 0]), group(FULL, [5, 11]), group(WINDOW, [1, 3, 4])]
    full, window = sections(groups)
    assert (full.window, full.tables) == (0, (1, 1))
    assert (window.window, window.tables) == (512, (0, 2, 0, 2, 2, 0))
    assert describe((full, window)) == "gqa@5,11+sliding_window:512@0,1,2,3,4,10"
    other = sections([group(FULL, [11]), group(WINDOW, list(range(5))), group(FULL, [5]), group(WINDOW, [10])])
    assert [part.layers for part in other] == [full.layers, window.layers]
    assert page_tables(groups) == PageTables((512, 0, 512), (3, 2, 3), (0, 1, 2))
    assert describe(sections([group(FULL, [0, 1])])) == "gqa"
    assert describe(sections([group(WINDOW, [0, 1])])) == "sliding_window:512"


@given(
    tables=st.integers(1, 3),
    per_block=st.integers(1, 4),
    blocks=st.integers(1, 5),
    data=st.data(),
)
def test_a_load_cut_into_blocks_is_the_load(tables: int, per_block: int, blocks: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, per_block - 1))
    total = data.draw(
        st.integers((blocks - 1) * per_block - first + 1, blocks * per_block - first).filter(lambda n: n > 0)
    )
    pages = [[table * 1000 + 1 + index for index in range(total)] for table in range(tables)]
    keys = tuple(BlockKey(bytes([index]) * 16) for index in range(blocks))
    parts = list(Load("r", keys, tuple(page for column in pages for page in column), first).parts(per_block, tables))
    assert [key for key, _, _ in parts] == list(keys)
    assert [start for _, _, start in parts] == [first] + [0] * (blocks - 1)
    for table, column in enumerate(pages):
        cut = [list(row)[table * (n := len(row) // tables) : (table + 1) * n] for _, row, _ in parts]
        assert [page for row in cut for page in row] == column


def test_only_windows_lose_pages() -> None:
    tables = PageTables((0, 64), (2, 4), (0, 1))
    assert tables.windowed
    assert tables.row([[7, 8, 9, 3], [0, 0, 5, 6]], range(1, 4)) == (8, 9, 3, ABSENT, 5, 6)
    assert not PageTables().windowed
