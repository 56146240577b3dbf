"""LMCache's ``native_plugin`` interface: six methods, one event descriptor."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from connectors.exchange import Bytes
from connectors.lmcache.chunks import Chunks
from connectors.lmcache.options import Options

Completion = tuple[int, bool, str, list[bool] | None]
"""Future id, whether it went well, what went wrong, one answer a key."""


class KVStoreConnector:
    """A connector over the node of this machine. Any thread may call; nothing blocks but ``close``."""

    def __init__(self, **adapter_params: Any) -> None:
        """Raises ConfigError for settings that do not exist: LMCache then refuses to start."""
        options = Options.parse(adapter_params)
        self._chunks = Chunks(options)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._done: list[Completion] = []
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="kvstore")

    def event_fd(self) -> int:
        """Readable while completions wait."""
        return self._fd

    def submit_batch_set(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Store; complete and well only when every chunk is held."""
        return self._submit(lambda: self._chunks.save(keys, [flat(view) for view in views]), every=True)

    def submit_batch_get(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Fill the views of the chunks that are there and whole."""
        return self._submit(lambda: self._chunks.load(keys, [flat(view) for view in views]))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        return self._submit(lambda: self._chunks.contains(keys))

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._submit(lambda: self._chunks.delete(keys))

    def drain_completions(self) -> list[Completion]:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass
        with self._lock:
            done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)
        self._chunks.close()
        os.close(self._fd)

    def _submit(self, work: Callable[[], list[bool]], every: bool = False) -> int:
        future = next(self._ids)

        def run() -> None:
            try:
                answers = work()
                well = all(answers) or not every
                completion: Completion = (future, well, "" if well else "not every chunk was stored", answers)
            except Exception as error:  # LMCache waits for every future, whatever happens
                completion = (future, False, f"{type(error).__name__}: {error}", None)
            with self._lock:
                self._done.append(completion)
            os.eventfd_write(self._fd, 1)

        self._pool.submit(run)
        return future


def flat(view: memoryview) -> Bytes:
    """LMCache's buffer as bytes, without a copy: its own format keeps it from being assigned to."""
    return np.frombuffer(view.cast("B"), np.uint8)
