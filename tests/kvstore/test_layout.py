"""Range arithmetic of the canonical layouts against brute force."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import IdentityError
from kvstore.layout import ORDERS, Axis, BlockLayout, Run


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    order = draw(st.sampled_from(sorted(ORDERS)))
    mla = order == "token_layer"
    groups = draw(st.integers(1, 3)) if "head_group" in ORDERS[order] else 1
    return BlockLayout(
        tokens=draw(st.integers(1, 5)),
        layers=draw(st.integers(1, 3)),
        kv_heads=1 if mla else groups * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 3)),
        itemsize=draw(st.sampled_from([1, 2, 4])),
        kv=1 if mla else 2,
        order=order,
        head_groups=groups,
    )


def byte_offset(layout: BlockLayout, **at: int) -> int:
    """Offset of one element, by the definition of the order."""
    per_group = layout.kv_heads // layout.head_groups
    index = {**at, "head_group": at["head"] // per_group, "head_in_group": at["head"] % per_group}
    size = {
        "kv": layout.kv,
        "head": layout.kv_heads,
        "token": layout.tokens,
        "layer": layout.layers,
        "dim": layout.head_dim,
        "head_group": layout.head_groups,
        "head_in_group": per_group,
    }
    offset = 0
    for part in ORDERS[layout.order]:
        offset = offset * size[part] + index[part]
    return offset * layout.itemsize


def owned_bytes(layout: BlockLayout, chosen: dict[str, range]) -> set[int]:
    ranges = {axis.value: range(layout.size(axis)) for axis in Axis} | chosen
    owned = set()
    for values in product(*ranges.values()):
        start = byte_offset(layout, **dict(zip(ranges, values, strict=True)))
        owned.update(range(start, start + layout.itemsize))
    return owned


@given(layouts(), st.data())
def test_runs_are_the_bytes_of_the_selection(layout: BlockLayout, data: st.DataObject) -> None:
    chosen = {}
    for name, axis in [("heads", Axis.HEAD), ("layers", Axis.LAYER), ("tokens", Axis.TOKEN), ("kv", Axis.KV)]:
        start = data.draw(st.integers(0, layout.size(axis) - 1))
        chosen[name] = (start, data.draw(st.integers(start + 1, layout.size(axis))))
    runs = layout.runs(**chosen)
    covered = [byte for run in runs for byte in range(run.offset, run.offset + run.length)]
    assert len(covered) == len(set(covered))
    axes = {"heads": "head", "layers": "layer", "tokens": "token", "kv": "kv"}
    assert set(covered) == owned_bytes(layout, {axes[name]: range(*value) for name, value in chosen.items()})
    assert all(a.offset + a.length < b.offset for a, b in pairwise(runs)), "not ascending or not maximal"


@given(layouts(), st.integers(1, 12))
def test_ranks_cover_a_block_exactly_once(layout: BlockLayout, ranks: int) -> None:
    if ranks > layout.kv_heads or layout.kv_heads % ranks:
        return
    runs = [run for rank in range(ranks) for run in layout.runs(heads=layout.rank_heads(rank, ranks))]
    assert sum(run.length for run in runs) == layout.nbytes
    assert len({byte for run in runs for byte in range(run.offset, run.offset + run.length)}) == layout.nbytes


def test_a_rank_owns_one_run_of_k_and_one_of_v() -> None:
    llama = BlockLayout(tokens=64, layers=80, kv_heads=8, head_dim=128, itemsize=2)
    assert llama.nbytes == 20 << 20
    share = llama.nbytes // 16
    assert llama.runs(heads=llama.rank_heads(3, 8)) == (Run(3 * share, share), Run(11 * share, share))


def test_more_ranks_than_heads_hold_replicas() -> None:
    layout = BlockLayout(tokens=1, layers=1, kv_heads=4, head_dim=1, itemsize=1)
    assert [layout.rank_heads(rank, 8) for rank in range(8)] == [(h, h + 1) for h in (0, 0, 1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(
    "bad",
    [
        {"order": "sideways"},
        {"kv": 3},
        {"tokens": 0},
        {"head_groups": 3},
    ],
)
def test_an_impossible_layout_is_refused(bad: dict[str, object]) -> None:
    fields: dict[str, object] = {"tokens": 1, "layers": 1, "kv_heads": 4, "head_dim": 1, "itemsize": 1} | bad
    with pytest.raises(IdentityError):
        BlockLayout(**fields)  # type: ignore[arg-type]


def test_impossible_selections_are_refused() -> None:
    layout = BlockLayout(tokens=4, layers=1, kv_heads=4, head_dim=1, itemsize=1)
    for heads in [(0, 5), (2, 2), (-1, 1)]:
        with pytest.raises(IdentityError, match="head"):
            layout.runs(heads=heads)
    for rank, ranks in [(0, 3), (2, 2), (0, 6)]:
        with pytest.raises(IdentityError):
            layout.rank_heads(rank, ranks)
