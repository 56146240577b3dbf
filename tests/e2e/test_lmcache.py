"""LMCache itself drives the store: its own storage bench, with verification, and a live server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.testing.node import NodeProcess, wait_for
from kvstore.testing.servers import Daemon, free_port

pytest.importorskip("lmcache")

LMCACHE = [str(Path(sys.executable).with_name("lmcache"))]
ENVIRONMENT = {
    **os.environ,
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "ERROR",
}
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    sizes = ("host.bytes=1GiB", "disk.bytes=1GiB", "disk.segment_bytes=256MiB")
    with NodeProcess(tmp_path_factory.mktemp("node"), *sizes) as running:
        yield running


def adapter(kind: str, node: NodeProcess, **fields: Any) -> str:
    """The one flag that a user adds."""
    class_name = {"native_plugin": "KVStoreConnector", "plugin": "KVStoreAdapter"}[kind]
    params = {"socket": str(node.socket), "autostart": False, "names": str(node.directory / "names.db")}
    described = {"type": kind, "module_path": "connectors.lmcache", "class_name": class_name}
    return json.dumps({**described, "adapter_params": params, **fields})


@pytest.mark.parametrize("kind", ["native_plugin", "plugin"])
def test_lmcaches_bench_verifies_every_byte(node: NodeProcess, kind: str) -> None:
    argv = [*LMCACHE, "bench", "l2", "--l2-adapter", adapter(kind, node), "--num-keys", "16", "--in-flight", "4"]
    argv += ["--data-size-kb", "1024", "--rounds", "2", "--warmup-rounds", "1"]
    argv += ["--lookup-max-hit-rate", "1.0", "--no-skip-verify"]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = re.findall(r"(?:success_keys|found|loaded)=(\d+)/(\d+)", done.stdout)
    assert len(counts) == 9
    assert set(counts) == {("64", "64")}, done.stdout
    assert "All 64 keys data verified OK" in done.stdout


def test_a_live_server_lists_what_is_stored_and_outlives_its_node(node: NodeProcess, tmp_path: Path) -> None:
    port, admin = free_port(), free_port()
    argv = [*LMCACHE, "server", "--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1"]
    argv += ["--http-port", str(admin), "--l1-size-gb", "1", "--l1-init-size-gb", "1", "--eviction-policy", "LRU"]
    argv += ["--l2-adapter", adapter("plugin", node)]

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}{path}", timeout=10) as answer:
            return json.load(answer)

    def healthy() -> bool:
        try:
            ask("/healthcheck")
        except OSError:
            return False
        return True

    server = Daemon(argv, tmp_path / "server.log", healthy, environ=ENVIRONMENT)
    server.start()
    try:
        (status,) = ask("/status")["storage_manager"]["l2_adapters"]
        assert status["is_healthy"]
        assert ask("/cache/objects?tier=l2") is not None
        node.kill()
        (status,) = ask("/status")["storage_manager"]["l2_adapters"]
        assert not status["is_healthy"]
        node.start()
        wait_for(lambda: ask("/status")["storage_manager"]["l2_adapters"][0]["is_healthy"], 20)
    finally:
        server.stop()
