"""Real servers on free loopback ports, as context managers: S3 for tests, plain HTTP as a ceiling for benchmarks.

* ``ministack``: an S3 emulator that starts in half a second and keeps its objects over a restart. Conditional writes as on
  AWS; refuses unknown access keys, but does not check the secret. Python package ``ministack``.
* ``radosgw``: Ceph's S3 gateway over one memory-backed OSD. Checks signatures; takes some 15 s and 0.5 GB.
  Debian packages ceph-mon, ceph-osd, radosgw and ceph-common.
* ``nginx_webdav``: no signatures and no checksums; what a client reaches here is the client's own limit.
  Debian package nginx-light.

All data lives in a temporary folder and is gone when the context ends.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 3.0


class ServerUnavailable(Exception):
    """A server is not installed, or did not start; says which and why."""


class Daemon:
    """A child process that can be ended, started again on the same data, and frozen."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        environ: Mapping[str, str] | None = None,
        patience: float = STOP_SECONDS,
    ) -> None:
        """``ready`` is asked until it says that the server answers; ``patience`` is how long it may take to end, in seconds."""
        self.argv = tuple(argv)
        with_parent = ["setpriv", "--pdeathsig", "KILL", "--"]  # a killed test run leaves no server behind
        self._command = [*(with_parent if shutil.which("setpriv") else []), *argv]
        self.log = log
        self._ready = ready
        self._environ = {**os.environ, **(environ or {})}
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended, by itself or otherwise."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers. Raises ServerUnavailable with the end of its log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerUnavailable(f"{self.argv[0]} did not start:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> int:
        """End it, a frozen one too. Its exit status, negative for the signal that ended it; 0 when it was not started."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(self._patience)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill(self) -> None:
        """End it without warning."""
        assert self._process is not None, "not running"
        self._process.kill()
        self._process.wait()
        self._process = None

    def freeze(self) -> None:
        """Stop it in its tracks: connections are still accepted by the kernel, and never answered."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server. Address buckets path-style."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    frontend: Daemon = field(repr=False)
    region: str = "us-east-1"
    ca_file: Path | None = None

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.frontend.stop()

    def restart(self) -> None:
        """Serve again, on the same port and data."""
        self.frontend.start()

    def freeze(self) -> None:
        """Accept connections and never answer."""
        self.frontend.freeze()

    def thaw(self) -> None:
        self.frontend.thaw()


@contextmanager
def ministack(tls: bool = False) -> Iterator[S3Server]:
    """A fresh ministack; with ``tls`` behind a certificate of an authority of its own (``ca_file``)."""
    if importlib.util.find_spec("ministack") is None:
        raise ServerUnavailable("the Python package ministack is not installed")
    with _folder() as folder:
        port = free_port()
        environ = {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "AUTH": "true",
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(folder / "objects"),
            "PERSIST_STATE": "1",
            "STATE_DIR": str(folder / "state"),
        }
        ca_file = None
        if tls:
            ca_file = folder / "ca.pem"
            certificate(ca_file, folder / "cert.pem", folder / "key.pem")
            environ |= {
                "USE_SSL": "1",
                "MINISTACK_SSL_CERT": str(folder / "cert.pem"),
                "MINISTACK_SSL_KEY": str(folder / "key.pem"),
            }
        daemon = Daemon([sys.executable, "-m", "ministack"], folder / "log", lambda: listens(port), environ)
        with _running(daemon):
            scheme = "https" if tls else "http"
            yield S3Server("ministack", f"{scheme}://127.0.0.1:{port}", "test", "test", daemon, ca_file=ca_file)


@contextmanager
def nginx_webdav() -> Iterator[str]:
    """nginx as a store without signatures; yields its URL. ``/bkt/`` takes PUT, GET and DELETE.

    The data is kept on tmpfs, so that no disk is measured; an ETag is always sent, because S3 clients insist on one.
    """
    nginx = _executable("nginx", "nginx-light")
    with _folder("/dev/shm") as folder:
        (folder / "data/bkt").mkdir(parents=True)
        (folder / "tmp").mkdir()
        port = free_port()
        (folder / "nginx.conf").write_text(_NGINX.format(port=port))
        user = ["-g", "user root;"] if os.geteuid() == 0 else []
        daemon = Daemon([nginx, "-p", f"{folder}/", "-c", "nginx.conf", *user], folder / "log", lambda: listens(port))
        with _running(daemon):
            yield f"http://127.0.0.1:{port}"


_NGINX = """
worker_processes 1;
daemon off;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  tcp_nodelay on;
  keepalive_requests 1000000;
  output_buffers 2 512k;
  client_max_body_size 0;
  client_body_buffer_size 1m;
  client_body_temp_path tmp;
  proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    root data;
    location / {{
      dav_methods PUT DELETE;
      create_full_put_path on;
      add_header ETag '"0123456789abcdef0123456789abcdef"';
    }}
  }}
}}
"""


@contextmanager
def radosgw(
    access_key: str = "kvstore", secret_key: str = "kvstore-secret", nbytes: int = 2 << 30
) -> Iterator[CephGateway]:
    """A fresh Ceph cluster of one monitor, one OSD in memory (at most ``nbytes``) and one S3 gateway."""
    for tool in ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool"):
        _executable(tool, "ceph-mon, ceph-osd, radosgw and ceph-common")
    with _folder() as folder, ExitStack() as stack:
        port = free_port()
        ceph = _Ceph(folder, port, nbytes)
        ceph.lay_out()
        stack.enter_context(_running(ceph.daemon("mon", ["ceph-mon", "-i", "a", "-f"], ceph.monitor_answers)))
        ceph.add_osd()
        stack.enter_context(_running(ceph.daemon("osd", ["ceph-osd", "-i", "0", "-f"], ceph.osd_is_up)))
        user = ["--uid=kvstore", "--display-name=kvstore", f"--access-key={access_key}", f"--secret-key={secret_key}"]
        ceph.run("radosgw-admin", "-n", "client.rgw.a", "user", "create", *user)
        gateway = ceph.daemon("rgw", ["radosgw", "-n", "client.rgw.a", "-f"], lambda: listens(port))
        stack.enter_context(_running(gateway))
        yield CephGateway("radosgw", f"http://127.0.0.1:{port}", access_key, secret_key, gateway, cluster=ceph)


class _Ceph:
    """The folder, configuration and keys of a one-machine cluster."""

    def __init__(self, folder: Path, port: int, nbytes: int) -> None:
        self.folder = folder
        self.fsid = str(uuid.uuid4())
        self.address = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
        self.environ = {"CEPH_CONF": str(folder / "ceph.conf")}
        for name in ("mon", "osd", "run", "log"):
            (folder / name).mkdir()
        (folder / "ceph.conf").write_text(
            _CEPH.format(fsid=self.fsid, address=self.address, folder=folder, port=port, nbytes=nbytes)
        )

    def run(self, *argv: str, timeout: float = START_SECONDS) -> str:
        done = subprocess.run(
            argv, cwd=self.folder, env={**os.environ, **self.environ}, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise ServerUnavailable(f"{argv[0]} failed: {done.stderr[-1000:]}")
        return done.stdout

    def daemon(self, name: str, argv: Sequence[str], ready: Callable[[], bool]) -> Daemon:
        return Daemon(argv, self.folder / "log" / f"{name}.out", ready, self.environ)

    def lay_out(self) -> None:
        """Keys and the monitor's store. cephx stays on: without it the daemons of Ceph 16 hang at start."""
        self.run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", self.address, "monmap")
        keyring = ["ceph-authtool", "admin.keyring"]
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        gateway = ["--cap", "mon", "allow rwx", "--cap", "osd", "allow rwx", "--cap", "mgr", "allow rw"]
        self.run(*keyring, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self.run(*keyring, "--gen-key", "-n", "client.admin", *everything)
        self.run(*keyring, "--gen-key", "-n", "client.rgw.a", *gateway)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "admin.keyring")

    def add_osd(self) -> None:
        self.run("ceph", "osd", "create")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--mkkey", "--no-mon-config")
        self.run("ceph", "auth", "add", "osd.0", "osd", "allow *", "mon", "allow profile osd", "-i", "osd/keyring")

    def monitor_answers(self) -> bool:
        return self._asks("-s") is not None

    def osd_is_up(self) -> bool:
        return "1 up" in (self._asks("osd", "stat") or "")

    def _asks(self, *argv: str) -> str | None:
        try:
            return self.run("ceph", *argv, timeout=5)
        except (ServerUnavailable, subprocess.TimeoutExpired):
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CephGateway(S3Server):
    """Ceph's S3 gateway."""

    cluster: _Ceph = field(repr=False)

    def limit(self, bucket: str, nbytes: int | None) -> None:
        """Refuse to put more than ``nbytes`` into a bucket, as when it is full; None lifts that. Takes effect at once."""
        quota = ["quota", "set", "--quota-scope=bucket", f"--bucket={bucket}"]
        self.cluster.run(
            "radosgw-admin", "-n", "client.rgw.a", *quota, f"--max-size={-1 if nbytes is None else nbytes}"
        )
        enable = ["quota", "disable" if nbytes is None else "enable", "--quota-scope=bucket", f"--bucket={bucket}"]
        self.cluster.run("radosgw-admin", "-n", "client.rgw.a", *enable)


_CEPH = """
[global]
fsid = {fsid}
keyring = {folder}/admin.keyring
mon host = {address}
mon initial members = a
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = {nbytes}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = 16800
ms bind port max = 16900
run dir = {folder}/run
log file = {folder}/log/$name.log
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
keyring = {folder}/osd/keyring
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def certificate(ca_file: Path, cert_file: Path, key_file: Path) -> None:
    """Write a new authority's certificate, and a certificate and key for 127.0.0.1 that it signed, as PEM files."""
    try:
        import trustme
    except ImportError:
        raise ServerUnavailable("the Python package trustme is not installed") from None
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(ca_file)
    issued.private_key_pem.write_to_path(key_file)
    cert_file.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _executable(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ServerUnavailable(f"{name} is not installed (Debian: {package})")
    return found


@contextmanager
def _running(daemon: Daemon) -> Iterator[None]:
    try:
        daemon.start()
        yield
    finally:
        daemon.stop()


@contextmanager
def _folder(parent: str = "/tmp") -> Iterator[Path]:
    """A short path: Unix sockets of the servers live in it, and theirs have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
