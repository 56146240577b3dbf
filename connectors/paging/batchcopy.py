"""Many copies between device and registered host memory in one call.

One by one, a copy engine stands idle for about a microsecond between copies: pieces of 1.25 MiB reach 0.90 of the bus, those of
128 KiB 0.45. Handed over as a batch they reach 0.99 and 0.95.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

from cupy.cuda import runtime


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


def copy_batch(targets: array[int], sources: array[int], sizes: array[int], stream: int) -> None:
    """Enqueue copies between addresses on a stream of our own; in no particular order among themselves."""
    if _batch is None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream)
        return
    table = (column.buffer_info()[0] for column in (targets, sources, sizes))
    status = _batch(*table, len(sizes), _ATTRIBUTES_AT, _FROM_FIRST_AT, 1, stream)
    if status:
        raise RuntimeError(f"cuMemcpyBatchAsync failed with CUDA error {status}")
