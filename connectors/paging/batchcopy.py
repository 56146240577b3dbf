"""Many copies between device and registered host memory in one call.

One by one, a copy engine stands idle for about a microsecond between copies: pieces of 1.25 MiB reach 0.90 of the bus, those of
128 KiB 0.45. Handed over as a batch they reach 0.99 and 0.95.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cupy.cuda import runtime

from connectors.paging.pieces import Column


class _Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``: how all copies of the batch are done."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


_IN_STREAM_ORDER = 1
_OVERLAP_WITH_COMPUTE = 1
_ATTRIBUTES = _Attributes(source_order=_IN_STREAM_ORDER, flags=_OVERLAP_WITH_COMPUTE)
_ATTRIBUTES_AT = ctypes.addressof(_ATTRIBUTES)
_FROM_FIRST = ctypes.c_size_t(0)
_FROM_FIRST_AT = ctypes.addressof(_FROM_FIRST)


def _driver_function() -> Any:
    """``cuMemcpyBatchAsync`` as of CUDA 13, which CuPy does not wrap; None where the driver is older."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync_v2
    except (OSError, AttributeError):
        return None
    address, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [address, address, address, size, address, address, size, address]
    return function


_batch = _driver_function()


class CopyBatch:
    """Copies between addresses, handed over part by part."""

    def __init__(self, targets: Column, sources: Column, sizes: Column) -> None:
        self._table = np.array((targets, sources, sizes), np.int64)
        self._at = self._table.ctypes.data
        self._row = self._table.strides[0]

    def enqueue(self, first: int, stop: int, stream: int) -> None:
        """Enqueue copies ``first:stop`` on a stream of our own; in no particular order among themselves."""
        if _batch is None:
            for target, source, size in self._table[:, first:stop].T.tolist():
                runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream)
            return
        at = self._at + first * self._table.itemsize
        part = (at, at + self._row, at + 2 * self._row)
        status = _batch(*part, stop - first, _ATTRIBUTES_AT, _FROM_FIRST_AT, 1, stream)
        if status:
            raise RuntimeError(f"cuMemcpyBatchAsync failed with CUDA error {status}")
