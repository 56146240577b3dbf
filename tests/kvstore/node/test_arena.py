"""The arena's mapping: pages there before they are needed, and gone with the last who needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.node.arena import Arena

MIB = 1 << 20
NBYTES = 40 * MIB
"""More than is populated at a time, and no multiple of it."""


def mapped() -> Arena:
    """A client's mapping of what a node has written to, whose node is gone."""
    node = Arena.create(NBYTES, 7)
    node.buffer[::4096] = bytes(range(256)) * (NBYTES // 4096 // 256)
    client = Arena.mapped(os.dup(node.fd), NBYTES, 7)
    node.close()
    return client


def resident() -> list[int]:
    """Bytes of each mapping of an arena that this process has pages of."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            ours = "/dev/shm/#" in line
        elif ours and line.startswith("Rss:"):
            found.append(int(line.split()[1]) << 10)
    return found


def test_every_page_is_there_once_populated_and_none_is_changed() -> None:
    before = sum(resident())
    arena = mapped()
    assert sum(resident()) == before
    arena.populate()
    assert sum(resident()) == before + NBYTES
    assert bytes(arena.buffer[::4096]) == bytes(range(256)) * (NBYTES // 4096 // 256)
    arena.close()


def test_memory_is_given_back_with_the_last_view() -> None:
    before = resident()
    arena = mapped()
    arena.populate()
    view = arena.slot(4096, 4096)
    arena.close()
    assert len(resident()) == len(before) + 1
    assert view[0] == 1
    view.release()
    del arena
    assert resident() == before


def test_populating_what_was_closed_does_nothing() -> None:
    arena = mapped()
    arena.close()
    arena.populate()


def test_more_than_there_is_room_for_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"host\.bytes"):
        Arena.create(1 << 60, 1)
