"""Keeping a staging buffer in the GPU's second-level cache.

What a gather writes, a copy engine reads a little later: if the bytes are still in L2 by then, they cost the memory that a
decoding engine lives on nothing. CUDA lets a program set a part of L2 aside for what it names (compute capability 8.0 and
later); the rest of the cache, and what the part does not hold, stays to everybody.
"""

from __future__ import annotations

import ctypes

from cupy.cuda import runtime

_MAX_PERSISTING_BYTES = 108
"""``cudaDevAttrMaxPersistingL2CacheSize``."""
_PERSISTING_BYTES = 6
"""``cudaLimitPersistingL2CacheSize``, of the process."""
_ACCESS_POLICY = 1
"""``cudaStreamAttributeAccessPolicyWindow``."""
_STREAMING, _PERSISTING = 1, 2


class _Window(ctypes.Structure):
    """``cudaAccessPolicyWindow``, in the space of a ``cudaStreamAttrValue``."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("num_bytes", ctypes.c_size_t),
        ("hit_ratio", ctypes.c_float),
        ("hit", ctypes.c_int),
        ("miss", ctypes.c_int),
        ("rest", ctypes.c_char * 36),
    )


def room(device: int) -> int:
    """Bytes of a GPU's L2 that can be set aside; 0 where that is not to be had (older GPUs, MIG)."""
    return int(runtime.deviceGetAttribute(_MAX_PERSISTING_BYTES, device))


def keep(address: int, nbytes: int, stream: int) -> None:
    """Kernels of ``stream`` keep these bytes of the current device in L2, and let all others pass through it.

    Where CUDA refuses, nothing changes: the bytes then go through memory.
    """
    try:
        aside = max(int(runtime.deviceGetLimit(_PERSISTING_BYTES)), nbytes)
        runtime.deviceSetLimit(_PERSISTING_BYTES, aside)
        set_attribute = ctypes.CDLL("libcuda.so.1").cuStreamSetAttribute
    except (runtime.CUDARuntimeError, OSError, AttributeError):
        return
    window = _Window(address, nbytes, 1.0, _PERSISTING, _STREAMING)
    set_attribute(ctypes.c_void_p(stream), _ACCESS_POLICY, ctypes.byref(window))
