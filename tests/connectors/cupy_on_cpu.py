"""A stand-in for the part of CuPy that paging uses: copies and kernels run at once, on the CPU.

Kernels are compiled from the same source by a C++ compiler. It is stricter than CUDA in two places: a copy must lie inside one
registration, and registrations must not overlap or outlive their test; and calls that would break the capture of a CUDA graph by
another thread are refused, as if one were always being captured.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

RELAXED = 2
PRELUDE = r"""
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Dim { unsigned x; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(threads)
template <class T> T __ldcs(const T* address) { return *address; }
"""
LAUNCH = r"""
extern "C" void launch(int forward, unsigned grid, unsigned threads, void** arguments)
{
    gridDim.x = grid, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            (forward ? gather : scatter)(*(const long long**)arguments[0], *(unsigned*)arguments[1],
                                         *(unsigned*)arguments[2], *(const Batch*)arguments[3]);
}
"""


class Launcher:
    """``gather`` and ``scatter`` of a kernel source, run thread by thread."""

    def __init__(self, source: str, defines: dict[str, str], folder: Path) -> None:
        constants = "".join(f"#define {name} {value}\n" for name, value in defines.items())
        text = PRELUDE + constants + source + LAUNCH
        name = hashlib.sha256(text.encode()).hexdigest()[:16]  # a library that is loaded must not be written again
        file, library = folder / f"{name}.cpp", folder / f"{name}.so"
        if not library.exists():
            file.write_text(text)
            options = ["-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            subprocess.run(["g++", *options, "-o", str(library), str(file)], check=True, capture_output=True)
        self._launch = ctypes.CDLL(str(library)).launch

    def __call__(self, gather: bool, grid: int, threads: int, arguments: int) -> None:
        """``arguments`` is the address of as many pointers, as CUDA takes it."""
        self._launch(int(gather), grid, threads, ctypes.c_void_p(arguments))


class Capture:
    """How each thread stands to the captures of others."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def exchange(self, mode: Any) -> None:
        """``cuThreadExchangeStreamCaptureMode``, of a reference to an integer."""
        asked, mode._obj.value = mode._obj.value, self.mode
        self._thread.mode = asked

    @property
    def mode(self) -> int:
        return getattr(self._thread, "mode", 0)

    def check(self) -> None:
        if self.mode != RELAXED:
            raise RuntimeError("operation not permitted when stream is capturing")


class Registry:
    """What is registered with ``cudaHostRegister``: address to bytes."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.capture = Capture()

    def register(self, address: int, nbytes: int, flags: int) -> None:
        self.capture.check()
        assert address % 4096 == 0
        assert all(address + nbytes <= start or address >= start + size for start, size in self.ranges.items())
        self.ranges[address] = nbytes

    def unregister(self, address: int) -> None:
        self.capture.check()
        del self.ranges[address]

    def copy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        inside = [
            start <= address and address + nbytes <= start + size
            for address in (target, source)
            for start, size in self.ranges.items()
        ]
        assert any(inside), "a copy spans registrations"
        ctypes.memmove(target, source, nbytes)


def modules(registry: Registry, folder: Path) -> dict[str, ModuleType]:
    """What to put in ``sys.modules``."""
    cupy, cuda, runtime, driver = (ModuleType(f"cupy{name}") for name in ("", ".cuda", ".cuda.runtime", ".cuda.driver"))
    launchers: list[tuple[Launcher, bool]] = []
    runtime.__dict__.update(
        CUDARuntimeError=RuntimeError,
        memcpyDefault=4,
        hostRegister=registry.register,
        hostUnregister=registry.unregister,
        memcpyAsync=registry.copy,
        eventRecord=lambda event, stream: None,
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
        streamWaitEvent=lambda stream, event: None,
        streamQuery=lambda stream: 0,
    )

    class Idle:
        """An event, a stream or a device of a machine that has always finished."""

        ptr = 0
        done = True

        def __init__(self, *args: object, **options: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def synchronize(self) -> None:
            registry.capture.check()

        def wait_event(self, event: object) -> None: ...

        def record(self, event: object) -> object:
            return event

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...]) -> None:
            defines = dict(option.removeprefix("-D").split("=", 1) for option in options)
            self._launcher = Launcher(code, defines, folder)

        def get_function(self, name: str) -> Any:
            launchers.append((self._launcher, name == "gather"))
            return SimpleNamespace(kernel=SimpleNamespace(ptr=len(launchers) - 1))

    def launch(function: int, grid: int, *dimensions: int) -> None:
        launcher, gather = launchers[function]
        launcher(gather, grid, dimensions[2], dimensions[-2])

    driver.launchKernel = launch
    cuda.__dict__.update(runtime=runtime, driver=driver, Device=Idle, Event=Idle, Stream=Idle)
    cupy.__dict__.update(cuda=cuda, RawModule=RawModule, __version__="0")
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime, "cupy.cuda.driver": driver}
