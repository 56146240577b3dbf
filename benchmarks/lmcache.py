"""LMCache's own storage bench over this store, beside its own ``fs`` backend: whole adapters, driven and verified by LMCache.

Each run has a fresh node or a fresh folder, since storing what is there already costs nothing. The runs of the backends
alternate. ``fs`` writes to the page cache and reads from it, without checksums and without ``fsync``; the node publishes in host
memory and writes to its disk in the background, within the same time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from kvstore.testing.node import NodeProcess

NODE = ("host.bytes=3GiB", "disk.bytes=4GiB")
KEYS, IN_FLIGHT, SIZE_KB = 16, 8, 4096
ENVIRONMENT = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "ERROR"}
OURS = {"native_plugin": "KVStoreConnector", "plugin": "KVStoreAdapter"}


def arguments(parser: Any) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="runs of each backend")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for backend in ("fs", *OURS):
            with tempfile.TemporaryDirectory(prefix="kvstore-lmcache-") as folder:
                for operation, speed in _measure(backend, Path(folder)).items():
                    speeds[backend, operation].append(speed)
        console.print(f"round {number + 1} of {args.rounds}")

    table = Table("MB/s, median (lowest to highest)", "store", "load")
    for backend in ("fs", *OURS):
        cells = [speeds[backend, operation] for operation in ("Store", "Load")]
        table.add_row(backend, *(f"{statistics.median(c):,.0f} ({min(c):,.0f} to {max(c):,.0f})" for c in cells))
    console.print(table)

    figures = {}
    for operation in ("Store", "Load"):
        for backend in OURS:
            pairs = zip(speeds[backend, operation], speeds["fs", operation], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            figures[f"{backend}_{operation.lower()}_ratio"] = ratio
    for operation in ("store", "load"):
        figures[f"{operation}_ratio_to_lmcache_fs"] = figures[f"plugin_{operation}_ratio"]
    return figures


def _measure(backend: str, folder: Path) -> dict[str, float]:
    """MB/s of one run by operation. Raises RuntimeError when a key is lost or wrong."""
    if backend == "fs":
        return _bench({"type": "fs", "base_path": str(folder)}, folder)
    with NodeProcess(folder, *NODE) as node:
        params = {"socket": str(node.socket), "autostart": False, "names": str(folder / "names.db")}
        described = {"type": backend, "module_path": "connectors.lmcache", "class_name": OURS[backend]}
        return _bench({**described, "adapter_params": params}, folder)


def _bench(adapter: Mapping[str, Any], folder: Path) -> dict[str, float]:
    output = folder / "result.json"
    argv = [str(Path(sys.executable).with_name("lmcache")), "bench", "l2", "--l2-adapter", json.dumps(adapter)]
    argv += [f"--num-keys={KEYS}", f"--in-flight={IN_FLIGHT}", f"--data-size-kb={SIZE_KB}"]
    argv += ["--rounds=3", "--warmup-rounds=1", "--lookup-max-hit-rate=1.0", "--no-skip-verify"]
    argv += ["--format=json", f"--output={output}"]
    done = subprocess.run(argv, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode or "data verified OK" not in done.stdout:
        raise RuntimeError(f"lmcache bench l2 failed with {adapter}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    operations = [value for name, value in json.loads(output.read_text())["metrics"].items() if name.startswith("op_")]
    for operation in operations:
        if operation["total_success"] != operation["total_keys"]:
            raise RuntimeError(f"{operation['operation']} of {adapter}: not every key came back")
    nbytes = KEYS * IN_FLIGHT * SIZE_KB / 1024
    return {operation["operation"]: nbytes * 1e3 / operation["duration_p50_ms"] for operation in operations}


STUDY = Study(
    "lmcache",
    "LMCache over this store beside LMCache's own file backend",
    run,
    {"store_ratio_to_lmcache_fs": ">=1", "load_ratio_to_lmcache_fs": ">=1"},
    arguments,
)
