"""Threads that do a node's work behind the one that answers."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

NICENESS = 10
"""Where the processors are all busy, a lookup goes before a checksum. On two of them, with saves being written to disk and to a
bucket, the median lookup took 4 to 17 ms without this and 1 to 3 with it."""


def workers(count: int | None, name: str) -> ThreadPoolExecutor:
    """A pool of ``count`` threads, or as many as Python takes. They, and those that a library starts in them, give way."""
    return ThreadPoolExecutor(count, name, initializer=_give_way)


def _give_way() -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux: of the thread
