"""Checks of a machine against its configuration: what would fail or be slow, found before an engine does.

Every check really does the thing: reads and writes the disk, asks the bucket, calls the node. Nothing is left behind.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from kvstore.config import Config
from kvstore.errors import KVStoreError, NodeUnavailable
from kvstore.node.arena import SHM_DIRECTORY
from kvstore.tenants.credentials import operator_token
from kvstore.units import human_bytes

if TYPE_CHECKING:
    from kvstore.catalog.base import CatalogStatus
    from kvstore.tiers.object import ServerFeatures

SAMPLE_BYTES = 256 << 20
"""Written and read to tell a disk's speed: more than the write cache of most, seconds even on a slow one."""
CHUNK_BYTES = 4 << 20
"""One read or write; a common size of blocks."""
SLOW_DISK = 0.2e9
"""Bytes per second under which loading loses against prefill even on a small machine."""
FAR_BUCKET_SECONDS = 0.1
"""Round trip above which a bucket is hardly in the same region."""


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    name: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    """What to do; empty when all is well."""


def examine(config: Config) -> Iterator[Finding]:
    """Run every check that applies, yielding each finding as it is made. Takes some seconds; raises nothing."""
    checks: list[tuple[str, Callable[[Config], Finding]]] = [
        ("node", check_node),
        ("shared memory", check_shared_memory),
        ("disk", check_disk),
        ("disk speed", check_disk_speed),
        ("object store", check_object_store),
        ("catalog", check_catalog),
        ("tenant secret", check_secret),
        ("GPU", check_gpu),
    ]
    for name, check in checks:
        try:
            yield check(config)
        except (OSError, KVStoreError) as error:
            yield Finding(name, Verdict.FAIL, str(error), "Mend what the message names, then run this again.")


def check_node(config: Config) -> Finding:
    """Whether a node answers at the socket."""
    try:
        status = node_status(config)
    except NodeUnavailable:
        return Finding("node", Verdict.WARN, f"none answers at {config.node.socket}", "Start it with: kvstore node")
    return Finding("node", Verdict.OK, f"version {status['version']}, pid {status['pid']}, at {config.node.socket}")


def node_status(config: Config) -> dict[str, object]:
    """The status of the node. Raises NodeUnavailable."""
    from kvstore.node.client import Client

    with Client(config.node.socket, name="kvstore doctor", token=partial(operator_token, config)) as client:
        status: dict[str, object] = client.call("status")
    return status


def check_shared_memory(config: Config) -> Finding:
    """Whether the arena fits, or is there already."""
    name, wanted = "shared memory", config.host.bytes
    try:
        node_status(config)
    except NodeUnavailable:
        pass
    else:
        return Finding(name, Verdict.OK, "the running node has its arena")
    free = _free_bytes(Path(SHM_DIRECTORY))
    found = f"{human_bytes(free)} free in {SHM_DIRECTORY}, host.bytes is {human_bytes(wanted)}"
    if free < wanted:
        remedy = (
            f"Lower host.bytes, or enlarge {SHM_DIRECTORY} (mount -o remount,size=..., or --shm-size of the container)."
        )
        return Finding(name, Verdict.FAIL, found, remedy)
    return Finding(name, Verdict.OK, found)


def check_disk(config: Config) -> Finding:
    """Whether the disk tier's folder can hold what it may grow to."""
    if not config.disk.enabled:
        return Finding("disk", Verdict.OK, "switched off")
    folder = _existing(config.disk_directory)
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", Verdict.FAIL, f"{folder} is not writable", "Set node.directory or disk.directory to one that is."
        )
    held = sum(file.stat().st_blocks * 512 for file in config.disk_directory.rglob("*") if file.is_file())
    free = _free_bytes(folder)
    found = f"{human_bytes(free)} free for {config.disk_directory}, disk.bytes is {human_bytes(config.disk.bytes)}"
    if held:
        found += f", {human_bytes(held)} of it taken already"
    if free + held < config.disk.bytes:
        return Finding("disk", Verdict.FAIL, found, "Lower disk.bytes, or free space.")
    return Finding("disk", Verdict.OK, found)


def check_disk_speed(config: Config) -> Finding:
    """Direct writes and reads of a nameless file in the disk tier's folder, with as many threads as the tier uses."""
    name = "disk speed"
    if not config.disk.enabled:
        return Finding(name, Verdict.OK, "no disk tier")
    folder = _existing(config.disk_directory)
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError as error:
        return Finding(
            name, Verdict.FAIL, f"no direct I/O in {folder}: {error.strerror}", "Use a folder on ext4 or xfs."
        )
    try:
        written, read = _measure(fd, config.disk.threads, min(SAMPLE_BYTES, _free_bytes(folder) // 2))
    finally:
        os.close(fd)
    found = f"direct I/O works: {written / 1e9:.2f} GB/s written, {read / 1e9:.2f} GB/s read"
    if read < SLOW_DISK:
        return Finding(
            name, Verdict.WARN, found, "Loading will hardly beat prefill: use a local NVMe, or disk.enabled = false."
        )
    return Finding(name, Verdict.OK, found)


def _measure(fd: int, threads: int, nbytes: int) -> tuple[float, float]:
    """Bytes per second written, with the sync, and read."""
    chunks = range(0, nbytes - CHUNK_BYTES + 1, CHUNK_BYTES)
    if not chunks:
        raise OSError("the disk is full")
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(threads):
        buffer = mmap.mmap(-1, CHUNK_BYTES)
        buffer.write(os.urandom(CHUNK_BYTES))
        buffers.put(buffer)

    def move(one: Callable[[int, mmap.mmap, int], int], offset: int) -> None:
        buffer = buffers.get()
        one(fd, buffer, offset)
        buffers.put(buffer)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(lambda offset: move(os.pwrite, offset), chunks))
        os.fdatasync(fd)
        written = len(chunks) * CHUNK_BYTES / (time.perf_counter() - started)
        started = time.perf_counter()
        list(pool.map(lambda offset: move(lambda fd, buffer, at: os.preadv(fd, [buffer], at), offset), chunks))
        return written, len(chunks) * CHUNK_BYTES / (time.perf_counter() - started)


def check_object_store(config: Config) -> Finding:
    """Credentials, bucket, what its server does, and the round trip."""
    name = "object store"
    if not config.object.url:
        return Finding(name, Verdict.OK, "none configured; blocks stay on this machine")
    features, seconds = asyncio.run(_ask_bucket(config))
    if features is None:
        remedy = "Check object.endpoint, the network and the server. A node starts all the same and goes on trying."
        return Finding(name, Verdict.FAIL, f"{config.object.url} does not answer", remedy)
    found = f"{config.object.url} answers" + (f" in {seconds * 1e3:.0f} ms" if seconds else "")
    if not features.ranged_get:
        return Finding(name, Verdict.FAIL, f"{found}, but ignores ranges", "Use a server that answers ranged GETs.")
    if not features.conditional_put:
        remedy = "Two nodes that save one block at the same moment both send it: correct, but more traffic."
        return Finding(name, Verdict.WARN, f"{found}, but ignores conditional writes", remedy)
    if seconds > FAR_BUCKET_SECONDS:
        return Finding(name, Verdict.WARN, found, "That is far away: use a bucket in this region.")
    return Finding(name, Verdict.OK, f"{found}; conditional writes and ranges work")


async def _ask_bucket(config: Config) -> tuple[ServerFeatures | None, float]:
    """What the server does, and the median seconds of a short listing (0 for a folder). Raises ConfigError."""
    from kvstore.assembly import object_settings, open_object
    from kvstore.tiers.object import Bucket

    tier = await open_object(config)
    await tier.close()
    seconds = [0.0]
    if tier.features is not None and tier.settings.folder is None:
        bucket = Bucket(object_settings(config))
        bucket.check()  # the first one connects
        for _ in range(5):
            started = time.perf_counter()
            bucket.check()
            seconds.append(time.perf_counter() - started)
    return tier.features, sorted(seconds)[len(seconds) // 2]


def check_catalog(config: Config) -> Finding:
    """Whether the catalog answers and covers the bucket."""
    name = "catalog"
    if not config.catalog.url:
        return Finding(name, Verdict.OK, "none configured; each node lists the bucket")
    found = asyncio.run(_ask_catalog(config))
    text = f"{config.catalog.url} knows {found.blocks} blocks"
    if not found.complete:
        return Finding(
            name, Verdict.WARN, f"{text}, not yet all of the bucket", "A node completes it, or: kvstore catalog rebuild"
        )
    return Finding(name, Verdict.OK, text)


async def _ask_catalog(config: Config) -> CatalogStatus:
    from kvstore.assembly import open_catalog

    catalog = await open_catalog(config)
    assert catalog is not None
    try:
        return await catalog.status()
    finally:
        await catalog.close()


def check_secret(config: Config) -> Finding:
    """Whether block keys are derived from a secret."""
    name = "tenant secret"
    if not config.identity.is_public:
        return Finding(name, Verdict.OK, f"set, {len(config.identity.secret_bytes())} bytes")
    if not config.object.url.startswith("s3:"):
        return Finding(name, Verdict.OK, "not set; blocks stay on this machine")
    remedy = (
        "Whoever can list the bucket can test guesses of prompts. Set identity.secret_file on all nodes that share it."
    )
    return Finding(name, Verdict.WARN, "not set, and the bucket is shared", remedy)


def check_gpu(_: Config) -> Finding:
    """Whether CuPy sees the GPU, where there is one."""
    name, has_gpu = "GPU", Path("/proc/driver/nvidia/version").exists()
    if importlib.util.find_spec("cupy") is None:
        if has_gpu:
            return Finding(name, Verdict.FAIL, "an NVIDIA driver, but no CuPy", "pip install 'llm-kvstore[gpu]'")
        return Finding(name, Verdict.OK, "none; engines on CPU only")
    try:
        cupy = importlib.import_module("cupy")
        cuda = cupy.cuda.runtime
        count, driver, runtime = cuda.getDeviceCount(), cuda.driverGetVersion(), cuda.runtimeGetVersion()
        cupy.arange(8).sum().item()  # compiles and runs a kernel
    except Exception as error:  # whatever a broken CUDA installation makes CuPy raise
        if not has_gpu:
            return Finding(name, Verdict.OK, "none; engines on CPU only")
        remedy = "Install the cupy-cudaXX package of the driver's CUDA version, as nvidia-smi shows it."
        return Finding(name, Verdict.FAIL, f"CuPy cannot use it: {error}", remedy)
    found = f"{count} found, driver for CUDA {driver // 1000}, CuPy for CUDA {runtime // 1000}"
    if driver // 1000 < runtime // 1000:
        return Finding(name, Verdict.FAIL, found, f"Update the driver, or install cupy-cuda{driver // 1000}x.")
    return Finding(name, Verdict.OK, found)


def _existing(path: Path) -> Path:
    """The path, or the closest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
