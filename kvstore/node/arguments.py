"""The arguments of a request: each is checked for type and bound before it is used.

Each function takes one argument by name and raises ProtocolError when it is not what it must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.errors import ProtocolError
from kvstore.identity import KEY_BYTES
from kvstore.tiers.base import Medium

MAX_TIMEOUT_SECONDS = 3600.0

Arguments = Mapping[str, Any]


def integer_of(args: Arguments, name: str, low: int, high: int) -> int:
    value = args.get(name, low)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{name} must be an integer from {low} to {high}")
    return value


def seconds_of(args: Arguments, name: str) -> float:
    value = args.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= MAX_TIMEOUT_SECONDS:
        raise ProtocolError(f"{name} must be seconds from 0 to {MAX_TIMEOUT_SECONDS:g}")
    return float(value)


def bytes_of(args: Arguments, name: str, longest: int) -> bytes:
    value = args.get(name, b"")
    if not isinstance(value, bytes) or len(value) > longest:
        raise ProtocolError(f"{name} must be at most {longest} bytes")
    return value


def digest_of(args: Arguments, name: str) -> bytes:
    value = args.get(name)
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        raise ProtocolError(f"{name} must be {KEY_BYTES} bytes")
    return value


def medium_of(args: Arguments, name: str) -> Medium:
    try:
        return Medium(args.get(name))
    except ValueError:
        raise ProtocolError(f"{name} must be one of {', '.join(medium.value for medium in Medium)}") from None


def text_of(args: Arguments, name: str, longest: int) -> str:
    value = args.get(name, "")
    if not isinstance(value, str) or len(value) > longest:
        raise ProtocolError(f"{name} must be a text of at most {longest} characters")
    return value
