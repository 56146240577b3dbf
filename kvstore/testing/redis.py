"""Real Redis servers on free loopback ports, as context managers. Debian package redis-server (Valkey's does as well).

* ``redis_server``: one server, with a password and TLS if asked for.
* ``redis_sentinel``: a server and a Sentinel that watches it.
* ``redis_cluster``: a cluster of one server, which refuses keys of different slots as a large one would.

All data lives in a temporary folder and is gone when the context ends.
"""

from __future__ import annotations

import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
def redis_sentinel() -> Iterator[RedisServer]:
    """A server behind a Sentinel; ``url`` is Sentinel's. Raises ServerUnavailable."""
    with redis_server() as watched, tempfile.TemporaryDirectory(prefix="kvs-") as name:
        port = free_port()
        config = Path(name) / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {name}\nsentinel monitor {SERVICE} 127.0.0.1 {watched.port} 1\n"
        )
        program = watched.daemon.argv[0]
        probe = _Probed("", port, watched.daemon)
        daemon = Daemon([program, str(config), "--sentinel"], Path(name) / "log", probe.answers)
        try:
            daemon.start()
            yield RedisServer(f"redis+sentinel://127.0.0.1:{port}/{SERVICE}/0", watched.port, watched.daemon)
        finally:
            daemon.stop()


@contextmanager
def redis_cluster() -> Iterator[RedisServer]:
    """A cluster of one server that owns every slot. Raises ServerUnavailable."""
    with redis_server("", False, True, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            deadline = time.monotonic() + START_SECONDS
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                if time.monotonic() > deadline:
                    raise ServerUnavailable("the cluster did not come up")
                time.sleep(0.05)
        yield RedisServer(f"redis+cluster://127.0.0.1:{server.port}", server.port, server.daemon)
