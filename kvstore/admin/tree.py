"""Chains that begin alike, as a tree. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Segment:
    """Blocks ``start`` to ``end`` (not included) that the same chains have."""

    start: int
    end: int
    keys: Sequence[bytes]
    through: list[str]
    """Names of the chains that have them, in the order given."""
    ends: list[str]
    """Those of them that have no further block."""
    children: list[Segment] = field(default_factory=list)
    """Most chains first."""


def grow(chains: Mapping[str, Sequence[bytes]]) -> list[Segment]:
    """The roots: one for each first block. A chain's name is its own; empty chains are nowhere."""
    return _segments({name: keys for name, keys in chains.items() if keys}, 0)


def _segments(chains: Mapping[str, Sequence[bytes]], start: int) -> list[Segment]:
    groups: dict[bytes, dict[str, Sequence[bytes]]] = {}
    for name, keys in chains.items():
        groups.setdefault(keys[start], {})[name] = keys
    found = [_segment(group, start) for group in groups.values()]
    return sorted(found, key=lambda segment: -len(segment.through))


def _segment(chains: Mapping[str, Sequence[bytes]], start: int) -> Segment:
    longest, end = next(iter(chains.values())), start + 1
    shortest = min(map(len, chains.values()))
    while end < shortest and all(keys[end] == longest[end] for keys in chains.values()):
        end += 1
    further = {name: keys for name, keys in chains.items() if len(keys) > end}
    return Segment(
        start,
        end,
        longest[start:end],
        list(chains),
        [name for name in chains if name not in further],
        _segments(further, end),
    )
