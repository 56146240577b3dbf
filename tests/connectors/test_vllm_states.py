"""States of recurrent layers: which of them are saved, what can be loaded with those that are there, and their bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from connectors.paging.base import BlockCopy
from connectors.paging.geometry import vllm_pages
from connectors.paging.reference import ReferencePager
from connectors.paging.torch import OpaquePager
from connectors.vllm.groups import page_tables, sections
from connectors.vllm.states import States, loadable, states
from kvstore.identity import Namespace
from kvstore.node.api import Lookup, Plan
from kvstore.node.arena import Arena
from kvstore.policy.planner import ENDLESS, Reason
from kvstore.tiers.base import Medium

PAGE = 16
BLOCKS = Namespace(
    model="tiny", weights="1", dtype="bfloat16", layers=1, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=PAGE, layout="opaque:test",
)  # fmt: skip
FULL = FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
STATE = MambaSpec(
    block_size=PAGE, shapes=((3, 4), (5,)), dtypes=(torch.bfloat16, torch.float32), page_size_padded=512, mamba_cache_mode="align"
)  # fmt: skip
STATE_BYTES = 3 * 4 * 2 + 5 * 4


def group(spec: Any, layers: list[int]) -> Any:
    return SimpleNamespace(kv_cache_spec=spec, layer_names=[f"model.layers.{layer}.mixer" for layer in layers])


def made(ranks: int = 1, groups: Any = None) -> States:
    found = states(groups or [group(STATE, [4, 0]), group(FULL, [1, 3]), group(STATE, [2])], BLOCKS, ranks, "cpu")
    assert found is not None
    return found


def test_attention_and_recurrent_layers_are_told_apart() -> None:
    groups = [group(STATE, [4, 0]), group(FULL, [1, 3]), group(STATE, [2])]
    assert page_tables(groups).groups == (1,)
    assert [part.layers for part in sections(groups)] == [tuple(group(FULL, [1, 3]).layer_names)]
    found = made()
    assert found.layers == ("model.layers.0.mixer", "model.layers.2.mixer", "model.layers.4.mixer")
    assert (found.groups, found.tables) == ((0, 2), (0, 1, 0))
    assert found.block_bytes == 3 * STATE_BYTES, "not the padding of the engine's pages"
    assert states([group(FULL, [1])], BLOCKS, 1, "cpu") is None
    regrouped = made(groups=[group(STATE, [2, 4]), group(STATE, [0]), group(FULL, [1, 3])])
    assert regrouped.namespace == found.namespace
    assert made(ranks=2).namespace != found.namespace


def test_a_state_is_saved_when_all_groups_have_it() -> None:
    handed = [(0, 7, 32), (2, 8, 32), (0, 9, 48), (2, 5, 40), (0, 4, 40), (2, 0, 64), (0, 3, 64)]
    assert made().complete(handed) == {32: (7, 8)}, "not at 40, within a block, nor where a page is missing"


def test_the_page_of_a_state_is_the_last_of_its_tokens() -> None:
    assert made().pages([[0, 0, 11], [1, 2, 3], [0, 0, 12]], 3 * PAGE) == (11, 12)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_only_what_ends_in_a_state_is_loaded(held: list[bool], data: st.DataObject) -> None:
    asked = max((i + 1 for i, here in enumerate(held) if here), default=len(held))
    blocks = data.draw(st.integers(0, asked + 1))
    near = data.draw(st.integers(0, blocks))
    planned = data.draw(st.integers(0, blocks))
    runs = tuple((medium, n) for medium, n in ((Medium.HOST, near), (Medium.DISK, blocks - near)) if n)
    found = loadable(Lookup(blocks, runs, plan=Plan(planned, Reason.OFF, ENDLESS)), asked, held)

    there = [i + 1 for i, here in enumerate(held) if here and i + 1 < asked]
    if blocks > asked:
        there.append(asked)  # the state that was asked for with the blocks was there too
    assert found.blocks == max((n for n in there if n <= blocks), default=0)
    assert sum(count for _, count in found.runs) == found.blocks
    assert found.plan is not None
    assert found.plan.blocks == max((n for n in there if n <= planned), default=0)


@given(st.integers(1, 3), st.data())
def test_gpu_and_cpu_pagers_give_a_state_the_same_bytes(ranks: int, data: st.DataObject) -> None:
    shape = made(ranks)
    rank = data.draw(st.integers(0, ranks - 1))
    pages, source = 6, np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    raw = torch.from_numpy(source.integers(-128, 128, (3, pages, 512), dtype=np.int8))
    caches = {
        name: raw[i, :, :STATE_BYTES].unflatten(1, (1, 1, STATE_BYTES)) for i, name in enumerate(shape.layers)
    }  # as vLLM registers them: [page, head, state, bytes], pages further apart
    views = vllm_pages(list(caches.values()), shape.layout, 1, shape.tables)
    reference = ReferencePager(views, shape.layout, shape.layout.rank_heads(rank, ranks))
    pager = OpaquePager(caches, pages, 1, rank, ranks, shape.tables)
    assert pager.block_bytes == reference.block_bytes == shape.block_bytes

    written = []
    for each in (reference, pager):
        arena = Arena.create(1 << 16, 1)
        each.save(arena, [BlockCopy((2, 5), 4096)]).wait()
        written.append(bytes(arena.buffer[4096 : 4096 + shape.block_bytes]))
    assert written[0] == written[1] != bytes(shape.block_bytes)
    before = raw.clone()
    pager.load(arena, [BlockCopy((3, 1), 4096)]).wait()
    for layer, table in enumerate(shape.tables):
        assert torch.equal(raw[layer, (3, 1)[table], :STATE_BYTES], before[layer, (2, 5)[table], :STATE_BYTES])
        assert torch.equal(raw[layer, :, STATE_BYTES:], before[layer, :, STATE_BYTES:]), "the padding is left alone"
