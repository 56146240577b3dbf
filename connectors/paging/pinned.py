"""Registering the node's arena with CUDA, so that the copy engines and kernels of a GPU reach it directly."""

from __future__ import annotations

import threading

import cupy
import numpy as np
from cupy.cuda import runtime

from connectors.paging.capture import BesideCaptures
from kvstore.errors import ConfigError
from kvstore.node.arena import Arena

SLICE_BYTES = 64 << 20
"""Registering takes up to 0.7 s a GiB, under a lock of the driver: a slice holds an engine's launch up by 45 ms at most."""

_PORTABLE = 1
"""``cudaHostRegisterPortable``: for every GPU of the process."""


class PinnedArena:
    """An arena's mapping, registered slice by slice on a background thread. Thread-safe.

    Shared by the pagers of the process: made by ``pin``, which counts them.
    """

    def __init__(self, arena: Arena, device: int) -> None:
        self.arena = arena
        self._view = np.frombuffer(arena.buffer[:], dtype=np.uint8)  # keeps the mapping alive
        self.address: int = self._view.ctypes.data
        self._device = device
        self._changed = threading.Condition()
        self._registered = 0
        self._error: Exception | None = None
        self._closing = False
        self.users = 0
        self._thread = threading.Thread(target=self._register, name="kv-pin", daemon=True)
        self._thread.start()

    def wait(self, stop: int) -> None:
        """Block until all bytes before ``stop`` are registered. Raises ConfigError when CUDA refuses the arena."""
        if self._registered >= stop:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._registered >= stop or self._error)
            if self._error is not None:
                raise ConfigError(
                    "host.bytes",
                    self.arena.nbytes,
                    f"CUDA cannot pin the arena: {self._error}",
                    "Lower it, or raise the limit on locked memory (ulimit -l).",
                ) from self._error

    @property
    def complete(self) -> bool:
        return self._registered >= self.arena.nbytes

    def close(self) -> None:
        """Give one use back; the last one unregisters."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            del _pinned[id(self.arena)]
        with self._changed:
            self._closing = True
        self._thread.join()
        with cupy.cuda.Device(self._device), BesideCaptures():
            for offset in range(0, self._registered, SLICE_BYTES):
                runtime.hostUnregister(self.address + offset)

    def _register(self) -> None:
        with cupy.cuda.Device(self._device), BesideCaptures():
            for offset in range(0, self.arena.nbytes, SLICE_BYTES):
                length = min(SLICE_BYTES, self.arena.nbytes - offset)
                error: Exception | None = None
                try:
                    runtime.hostRegister(self.address + offset, length, _PORTABLE)
                except Exception as refused:  # whatever it is, somebody may be waiting
                    error = refused
                with self._changed:
                    self._error = error
                    self._registered += 0 if error else length
                    self._changed.notify_all()
                    if error or self._closing:
                        return


def pin(arena: Arena, device: int) -> PinnedArena:
    """The process's registration of ``arena``, started if there is none. Give it back with ``close``."""
    with _lock:
        pinned = _pinned.get(id(arena))
        if pinned is None:
            pinned = _pinned[id(arena)] = PinnedArena(arena, device)
        pinned.users += 1
        return pinned


_lock = threading.Lock()
_pinned: dict[int, PinnedArena] = {}
