"""What a rank writes."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.identity import Namespace


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes of each block of a namespace."""

    namespace: Namespace
    part: int | None
    """None: nothing, another rank writes the same."""
    parts: int
    nbytes: int
    tokens: int
    """Whose KV a block holds."""
