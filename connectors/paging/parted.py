"""A block out of several pagers: a hybrid model's layers of each kind of attention are a part of the payload of their own.

A load then leaves the bytes of the sliding-window layers where they are when the window has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from connectors.paging.base import ABSENT, BlockCopy, Pager, Transfer
from kvstore.node.arena import Arena


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of a block."""

    pager: Pager
    tables: tuple[int, ...]
    """Which of a copy's page tables are the pager's, in the pager's order."""


class PartedPager(Pager):
    """Parts one behind the other in the payload."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._tables = sum(len(part.tables) for part in parts)
        self.block_bytes = sum(part.pager.block_bytes for part in parts)

    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        return self._each(arena, copies, to_arena=True)

    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> Transfer:
        return self._each(arena, copies, to_arena=False)

    def follow(self) -> None:
        for part in self._parts:
            part.pager.follow()

    def ready(self, arena: Arena) -> bool:
        return all(part.pager.ready(arena) for part in self._parts)

    def forget(self) -> None:
        for part in self._parts:
            part.pager.forget()

    def close(self) -> None:
        for part in self._parts:
            part.pager.close()

    def _each(self, arena: Arena, copies: Sequence[BlockCopy], to_arena: bool) -> Transfer:
        begun: list[Transfer] = []
        first = 0
        try:
            for part in self._parts:
                theirs = [cut for copy in copies if (cut := self._cut(copy, part.tables, first)) is not None]
                if theirs or not copies:
                    begun.append((part.pager.save if to_arena else part.pager.load)(arena, theirs))
                first += part.pager.block_bytes
        except BaseException:
            for transfer in begun:  # the caller may use the pages again
                with suppress(Exception):
                    transfer.wait()
            raise
        return Together(begun)

    def _cut(self, copy: BlockCopy, tables: Sequence[int], first: int) -> BlockCopy | None:
        """A part's share of a copy; None when it has nothing to do."""
        count = len(copy.pages) // self._tables
        pages = tuple(page for table in tables for page in copy.pages[table * count : (table + 1) * count])
        if all(page == ABSENT for page in pages):
            return None
        return BlockCopy(pages, copy.offset + first, copy.first_page)


class Together:
    """Several transfers as one."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self._transfers = tuple(transfers)

    def done(self) -> bool:
        return all(transfer.done() for transfer in self._transfers)

    def precede(self) -> None:
        for transfer in self._transfers:
            transfer.precede()

    def wait(self) -> None:
        failed: Exception | None = None
        for transfer in self._transfers:
            try:
                transfer.wait()
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
