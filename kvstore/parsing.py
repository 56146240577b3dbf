"""JSON that others wrote: in a bucket, a catalog, a file."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

LARGEST = 1 << 64
"""Beyond any number that we write; larger ones would overflow floats and arrays later."""


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``, for text that may be anything: raises ValueError and nothing else, and no number is infinite."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int:
    number = int(digits)
    if abs(number) >= LARGEST:
        raise ValueError("a number beyond all bounds")
    return number


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
