"""CUDA calls of ours while the engine captures CUDA graphs.

torch captures in CUDA's "global" mode: a call that a graph cannot hold, such as registering memory or asking for an event, then
fails in every thread, and breaks the capture, unless its thread is in "relaxed" mode. vLLM captures when it starts, which is
when the arena is pinned.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_RELAXED = 2
"""``CU_STREAM_CAPTURE_MODE_RELAXED``."""


def _driver_function() -> Any:
    """``cuThreadExchangeStreamCaptureMode``; None without a driver. It takes no time, so the interpreter lock is kept."""
    try:
        return ctypes.PyDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None


_exchange = _driver_function()


@contextmanager
def beside_captures() -> Iterator[None]:
    """Calls of this thread, on streams that are not being captured, neither fail nor break a capture of another thread."""
    if _exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    _exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        _exchange(ctypes.byref(mode))  # what it was before
