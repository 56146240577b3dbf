import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.units import exact_bytes, human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("4096", 4096), ("16GiB", 16 << 30), (" 16 gib ", 16 << 30), ("16Gi", 16 << 30), ("500MB", 500_000_000),
     ("1.5GiB", 3 << 29), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "16G", "-1GiB", "1e9", "0.3B", "16 GiB free", "9" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_exact_text_reads_back(nbytes: int) -> None:
    assert parse_bytes(exact_bytes(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (1_567_000_000, "1.46 GiB"), (300 << 30, "300 GiB")],
)
def test_human_text(nbytes: int, text: str) -> None:
    assert human_bytes(nbytes) == text
