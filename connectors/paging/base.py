"""The interface of a pager: the one seam between an engine's memory and the arena.

``torch.py`` implements it for CPU pages (opaque bytes) and as the plain reference; ``cuda.py`` for GPU pages with CuPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.node.arena import Arena

ABSENT = -1
"""In the place of a page that is left out."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One block to move: the engine pages that hold its tokens, in token order, and where its payload is in the arena."""

    pages: tuple[int, ...]
    """With several page tables (a hybrid model has one for each group of layers) the pages of each table in turn, equally many;
    ABSENT for pages that the engine does not keep, or not any more."""
    offset: int
    """Byte offset of the block's payload in the arena mapping (behind the envelope header)."""
    first_page: int = 0
    """Which page of the block ``pages`` starts at. Loads only: an engine that already holds the first or needs not the last
    pages of a block takes a part of it; a save writes all pages."""


class Transfer(Protocol):
    """A batch of copies on its way."""

    def done(self) -> bool:
        """True once every byte has arrived. Never blocks."""

    def wait(self) -> None:
        """Block until every byte has arrived. Raises what the copy raised."""

    def precede(self) -> None:
        """What the engine enqueues from now on waits for the copy. Called in the engine's thread.

        Raises when the copy could not be handed over.
        """


class Pager(ABC):
    """Moves this rank's share of blocks between engine pages and arena slots.

    ``save`` and ``load`` may be called by two threads at a time, each by one. An arena is prepared (pinned) when it is first
    seen; a restarted node brings another one. The engine's pages must not be reused, the arena slots stay leased or reserved,
    and ``copies`` stays as it is, until the returned transfer is done.
    """

    block_bytes: int
    """Payload bytes of a whole block, all ranks together: what is reserved in the arena."""

    @abstractmethod
    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        """Engine pages to arena, ordered after the engine's work that was enqueued so far."""

    @abstractmethod
    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        """Arena to engine pages."""

    def ready(self, arena: Arena) -> bool:
        """Whether all of the arena is prepared, so that no copy waits for that. Never blocks."""
        return False

    def forget(self) -> None:  # noqa: B027 (who does not prepare arenas keeps none)
        """Let go of the arena, as its node is gone. Not while ``load`` is called; saves that were begun go on."""

    def follow(self) -> None:  # noqa: B027 (a CPU has nothing to do)
        """The engine's thread begins a step: what is "enqueued so far" is on its present stream."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight and release memory registrations."""
