"""Byte sizes as people write them: ``16GiB``, ``500MB``, ``4096``."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
}  # fmt: skip
_BINARY = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in ``16GiB`` (2^30), ``16GB`` (10^9), ``16Gi`` or ``17179869184``. Raises ValueError.

    A bare ``G`` is refused: half of the world's tools mean 2^30 by it, the other half 10^9.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size in bytes")
    size = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def exact_bytes(nbytes: int) -> str:
    """The shortest text that ``parse_bytes`` reads back as ``nbytes``."""
    for name, unit in _BINARY:
        if nbytes and nbytes % unit == 0:
            return f"{nbytes // unit}{name}"
    return str(nbytes)


def human_bytes(nbytes: float) -> str:
    """A size for reading: three significant digits, ``1.46 GiB``."""
    for name, unit in _BINARY:
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    return f"{nbytes:.0f} B"
