"""Real Redis servers on free loopback ports, as context managers. Debian package redis-server (Valkey's does as well).

* ``redis_server``: one server, with a password and TLS if asked for.
* ``redis_sentinel``: a server, a Sentinel that watches it, and a replica if asked for.
* ``redis_cluster``: a cluster of one server, which refuses keys of different slots as a large one would.

All data lives in a temporary folder and is gone when the context ends.
"""

from __future__ import annotations

import shutil
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from kvstore.testing.servers import START_SECONDS, Daemon, ServerUnavailable, certificate, free_port

SERVICE = "catalog"
"""What Sentinel calls the server it watches."""


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server. ``url`` has no password in it."""

    url: str
    port: int
    daemon: Daemon = field(repr=False)
    password: str = field(default="", repr=False)
    ca_file: Path | None = None

    def stop(self) -> None:
        """End it; it has written its data down."""
        self.daemon.stop()

    def kill(self) -> None:
        """End it without warning; what it did since it last wrote its data down is lost."""
        self.daemon.kill()

    def restart(self) -> None:
        """Serve again, on the same port."""
        self.daemon.start()

    def freeze(self) -> None:
        """Accept connections and never answer."""
        self.daemon.freeze()

    def thaw(self) -> None:
        self.daemon.thaw()

    def client(self) -> Redis:
        """A blocking client, for a test's own look."""
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(self.ca_file)} if self.ca_file else {}
        return Redis("127.0.0.1", self.port, password=self.password or None, socket_timeout=5, **tls)


@contextmanager
def redis_server(password: str = "", tls: bool = False, append_only: bool = True, *more: str) -> Iterator[RedisServer]:
    """A server that keeps its data over a restart, unless ``append_only`` is off. Raises ServerUnavailable."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise ServerUnavailable("redis-server is not installed (Debian: redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        folder = Path(name)
        ca_file = folder / "ca.pem" if tls else None
        argv = [program, "--bind", "127.0.0.1", "--dir", name, "--save", ""]
        argv += ["--appendonly", "yes" if append_only else "no", "--appendfsync", "always"]
        argv += ["--port", "0" if tls else str(port)]
        if password:
            argv += ["--requirepass", password]
        if ca_file is not None:
            certificate(ca_file, folder / "cert.pem", folder / "key.pem")
            argv += ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(ca_file)]
            argv += ["--tls-cert-file", str(folder / "cert.pem"), "--tls-key-file", str(folder / "key.pem")]
        daemon = Daemon([*argv, *more], folder / "log", lambda: server.answers())
        scheme = "rediss" if tls else "redis"
        server = _Probed(f"{scheme}://127.0.0.1:{port}/0", port, daemon, password, ca_file)
        try:
            daemon.start()
            yield server
        finally:
            daemon.stop()


class _Probed(RedisServer):
    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (RedisError, OSError, ssl.SSLError):
            return False


@contextmanager
def redis_sentinel(replicated: bool = False) -> Iterator[RedisServer]:
    """A server behind a Sentinel; ``url`` is Sentinel's. Raises ServerUnavailable.

    ``replicated``: with a replica that takes over a few seconds after the server was killed.
    """
    with ExitStack() as stack:
        watched = stack.enter_context(redis_server("", False, True, "--repl-diskless-sync-delay", "0"))
        if replicated:
            replica = stack.enter_context(redis_server("", False, True, "--replicaof", "127.0.0.1", str(watched.port)))
            _wait_until(lambda: _in_step(replica), "the replica did not follow")
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs-"))
        port = free_port()
        config = Path(name) / "sentinel.conf"
        hasty = f"sentinel down-after-milliseconds {SERVICE} 1000\nsentinel failover-timeout {SERVICE} 5000\n"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {name}\nsentinel monitor {SERVICE} 127.0.0.1 {watched.port} 1\n"
            + (hasty if replicated else "")
        )
        program = watched.daemon.argv[0]
        probe = _Probed("", port, watched.daemon)
        daemon = Daemon([program, str(config), "--sentinel"], Path(name) / "log", probe.answers)
        try:
            daemon.start()
            if replicated:
                _wait_until(lambda: _replicas_known(port), "Sentinel did not find the replica")
            yield RedisServer(f"redis+sentinel://127.0.0.1:{port}/{SERVICE}/0", watched.port, watched.daemon)
        finally:
            daemon.stop()


def _in_step(replica: RedisServer) -> bool:
    with replica.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


def _replicas_known(port: int) -> bool:
    with Redis("127.0.0.1", port, socket_timeout=5) as sentinel:
        return bool(sentinel.execute_command("SENTINEL", "REPLICAS", SERVICE))


def _wait_until(condition: Callable[[], bool], problem: str) -> None:
    """Raises ServerUnavailable."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ServerUnavailable(problem)
        time.sleep(0.05)


@contextmanager
def redis_cluster() -> Iterator[RedisServer]:
    """A cluster of one server that owns every slot. Raises ServerUnavailable."""
    with redis_server("", False, True, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            _wait_until(
                lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"), "the cluster did not come up"
            )
        yield RedisServer(f"redis+cluster://127.0.0.1:{server.port}", server.port, server.daemon)
