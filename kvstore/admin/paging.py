"""Pages of a listing. A cursor is opaque to clients: it names the last item of the page before."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from kvstore.admin.problems import Problem

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=1000, description="Items in the page at most.")]
Cursor = Annotated[str, Query(max_length=256, description="From the page before; empty for the first one.")]


def encode_cursor(position: bytes) -> str:
    return base64.urlsafe_b64encode(position).decode().rstrip("=")


def decode_cursor(cursor: str) -> bytes:
    """Raises Problem (422)."""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, "invalid-cursor", "cursor is not one that this API gave") from None


def page_of(items: Sequence[T], name: Callable[[T], str], cursor: str, limit: int) -> tuple[list[T], str]:
    """The page behind ``cursor`` of ``items``, which are in an order of their own and have unique names.

    An item that has gone meanwhile starts the listing anew.
    """
    after = decode_cursor(cursor)
    start = next((at + 1 for at, item in enumerate(items) if name(item).encode() == after), 0)
    page = list(items[start : start + limit])
    more = start + limit < len(items)
    return page, encode_cursor(name(page[-1]).encode()) if more else ""
