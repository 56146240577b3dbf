"""CUDA calls of ours while the engine captures CUDA graphs.

torch captures in CUDA's "global" mode: a call that a graph cannot hold, such as registering memory or asking for an event, then
fails in every thread, and breaks the capture, unless its thread is in "relaxed" mode. vLLM captures when it starts, which is
when the arena is pinned.
"""

from __future__ import annotations

import ctypes
from typing import Any

_RELAXED = 2
"""``CU_STREAM_CAPTURE_MODE_RELAXED``."""


def _driver_function() -> Any:
    """``cuThreadExchangeStreamCaptureMode``; what does nothing without a driver. It takes no time, so the interpreter lock is
    kept."""
    try:
        return ctypes.PyDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return lambda mode: None


_exchange = _driver_function()


class BesideCaptures:
    """Within it, calls of this thread on streams that are not being captured neither fail nor break another thread's capture."""

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_RELAXED)
        _exchange(ctypes.byref(self._mode))

    def __exit__(self, *error: object) -> None:
        _exchange(ctypes.byref(self._mode))  # what it was before
