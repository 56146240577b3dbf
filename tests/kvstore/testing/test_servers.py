from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

from kvstore.testing.servers import Daemon, S3Server, ServerUnavailable, free_port, listens, ministack, nginx_webdav

pytestmark = pytest.mark.s3


def client(server: S3Server, access_key: str | None = None, secret_key: str | None = None) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=access_key or server.access_key,
        aws_secret_access_key=secret_key or server.secret_key,
        region_name=server.region,
        verify=str(server.ca_file) if server.ca_file else None,
        config=Config(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1}),
    )


def port_of(server: S3Server) -> int:
    port = urlsplit(server.endpoint).port
    assert port is not None
    return port


def test_a_server_comes_back_on_its_port_with_its_data() -> None:
    with ministack() as server:
        client(server).create_bucket(Bucket="bucket")
        client(server).put_object(Bucket="bucket", Key="key", Body=b"kept")
        server.stop()
        with pytest.raises(ConnectionError):
            client(server).get_object(Bucket="bucket", Key="key")
        server.restart()
        assert client(server).get_object(Bucket="bucket", Key="key")["Body"].read() == b"kept"
        assert "secret_key" not in repr(server)
    assert not listens(port_of(server))


def test_a_frozen_server_accepts_and_does_not_answer() -> None:
    with ministack() as server:
        server.freeze()
        assert listens(port_of(server))
        with pytest.raises(HTTPClientError):
            client(server).list_buckets()
        server.thaw()
        client(server).list_buckets()


def test_tls_is_signed_by_its_own_authority() -> None:
    with ministack(tls=True) as server:
        assert server.ca_file is not None
        client(server).list_buckets()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(server.endpoint)


def test_servers_listen_on_loopback_only(s3_server: S3Server) -> None:
    assert listening_addresses(port_of(s3_server)) == {"0100007F"}


def test_unknown_keys_are_refused(s3_server: S3Server) -> None:
    with pytest.raises(ClientError, match=r"InvalidAccessKeyId|403"):
        client(s3_server, access_key="nobody").list_buckets()


def test_radosgw_checks_the_secret(radosgw_server: S3Server) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(radosgw_server, secret_key="wrong").list_buckets()


def test_nginx_stores_what_it_is_given() -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with nginx_webdav() as url:
        put = urllib.request.Request(f"{url}/bkt/key", data=b"bytes", method="PUT")
        assert urllib.request.urlopen(put).status == 201
        reply = urllib.request.urlopen(f"{url}/bkt/key")
        assert reply.read() == b"bytes"
        assert reply.headers["ETag"]


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    daemon = Daemon(["sh", "-c", "echo no luck; exit 3"], tmp_path / "log", lambda: False)
    with pytest.raises(ServerUnavailable, match="no luck"):
        daemon.start()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_server_does_not_outlive_the_process_that_started_it() -> None:
    program = """
import time
from kvstore.testing.servers import ministack
with ministack() as server:
    print(server.endpoint, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    port = int(parent.stdout.readline().rsplit(":", 1)[1])
    assert listens(port)
    parent.kill()
    parent.wait()
    while listens(port):  # until the test's time is over
        time.sleep(0.01)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ServerUnavailable, match="nginx-light"), nginx_webdav():
        pass


def test_free_ports_are_free() -> None:
    assert not listens(free_port())


def listening_addresses(port: int) -> frozenset[str]:
    """IPv4 addresses (as the kernel writes them) on which something listens at ``port``."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    return frozenset(address for address, number in local if int(number, 16) == port)
