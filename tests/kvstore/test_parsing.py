"""JSON from outside."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.parsing import parse_json

NUMBERS = st.integers(-(1 << 64) + 1, (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
SOUND = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(SOUND)
def test_what_json_writes_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    ["", "{", b"\xff", "[" * 100_000, '{"a":' * 100_000, "1e999", "-1e999", "1" * 30, "1" * 100_000, "NaN", "Infinity"],
)
def test_what_nobody_should_believe_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of them
        parse_json(text)


@given(st.text() | st.binary())
def test_nothing_else_is_raised_and_no_number_is_infinite(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert not isinstance(value, float) or math.isfinite(value)
