"""The file that says how warm a node is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.warmth import MAX_BYTES, WarmState, Warmth, forget_warmth, read_warmth, warmth_path, write_warmth

counts = st.integers(0, 1 << 60)
times = st.floats(0, 1e10)
warmths = st.builds(
    Warmth,
    state=st.sampled_from(WarmState),
    started=times,
    updated=times,
    finished=st.none() | times,
    planned_blocks=counts,
    planned_bytes=counts,
    warm_blocks=counts,
    warm_bytes=counts,
    fetched_bytes=counts,
    skipped=st.dictionaries(st.text(max_size=9), counts, max_size=3),
    problem=st.text(max_size=99),
)


@given(warmths)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, warmth: Warmth) -> None:
    folder = tmp_path_factory.mktemp("node")
    write_warmth(folder, warmth)
    assert read_warmth(folder) == warmth
    assert [path.name for path in folder.iterdir()] == ["warmth.json"]


def test_share_and_gate() -> None:
    half = Warmth(state=WarmState.RUNNING, started=0, updated=0, planned_bytes=10, warm_bytes=5)
    assert half.share == 0.5
    assert half.enough(0.5)
    assert not half.enough(0.6)


def test_without_a_plan_only_a_warm_up_that_is_done_is_enough() -> None:
    shares = {state: Warmth(state=state, started=0, updated=0).share for state in WarmState}
    assert shares == {WarmState.RUNNING: 0, WarmState.DONE: 1, WarmState.FAILED: 0, WarmState.CANCELLED: 0}


def test_never_warmed_and_forgotten(tmp_path: Path) -> None:
    assert read_warmth(tmp_path) is None
    write_warmth(tmp_path, Warmth(state=WarmState.DONE, started=0, updated=0))
    forget_warmth(tmp_path)
    forget_warmth(tmp_path)
    assert read_warmth(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "lukewarm"},
        {"warm_bytes": -1},
        {"planned_bytes": 1.5},
        {"warm_blocks": True},
        {"started": "now"},
        {"updated": float("nan")},
        {"skipped": []},
        {"more": 1},
        {"problem": "x" * MAX_BYTES},
    ],
)
def test_a_file_that_cannot_be_is_as_good_as_none(tmp_path: Path, change: dict[str, object]) -> None:
    write_warmth(tmp_path, Warmth(state=WarmState.DONE, started=1.0, updated=2.0))
    fields = json.loads(warmth_path(tmp_path).read_text())
    warmth_path(tmp_path).write_text(json.dumps({**fields, **change}))
    assert read_warmth(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff"])
def test_not_even_json(tmp_path: Path, text: str) -> None:
    warmth_path(tmp_path).write_bytes(text.encode("latin-1"))
    assert read_warmth(tmp_path) is None
