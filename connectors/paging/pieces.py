"""How the shares of a window of blocks become copies. Arithmetic alone.

In plain Python: a transfer begins with some dozens of them, in a thread that has slept, and NumPy's way to the first number is
longer than this one to the last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.layout import Run


def _column() -> array[int]:
    return array("q")


@dataclass(frozen=True, slots=True)
class Pieces:
    """The copies of one group: addresses, and bytes."""

    arena: array[int] = field(default_factory=_column)
    staged: array[int] = field(default_factory=_column)
    sizes: array[int] = field(default_factory=_column)


def cut(
    blocks: Sequence[int], runs: Sequence[Run], arena: int, slice_bytes: int, buffers: Iterable[int], group_bytes: int
) -> Iterator[Pieces]:
    """The copies of the ``runs`` of blocks at these offsets of the arena at address ``arena``.

    Their shares lie one behind the other, as if in one long buffer. A group is ``group_bytes`` of that, wherever a block ends,
    and is staged in the next of ``buffers``, which are addresses. Copies are cut where groups meet, and where the arena's pinned
    slices meet: CUDA refuses one that spans two registrations. There are blocks, and buffers enough.
    """
    free = iter(buffers)
    pieces, staged, left = Pieces(), next(free), group_bytes
    for block in blocks:
        for offset, length in runs:
            at, stop = block + offset, block + offset + length
            while at < stop:
                if not left:
                    yield pieces
                    pieces, staged, left = Pieces(), next(free), group_bytes
                size = min(stop - at, left, slice_bytes - at % slice_bytes)
                pieces.arena.append(arena + at)
                pieces.staged.append(staged)
                pieces.sizes.append(size)
                at, staged, left = at + size, staged + size, left - size
    yield pieces
