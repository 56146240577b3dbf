"""Where a region's service shows its metrics: on loopback to everybody, elsewhere to who has a certificate; or at its API."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
from prometheus_client import CollectorRegistry, Gauge
from typer.testing import CliRunner

from kvstore.admin.auth import Role
from kvstore.admin.server import open_site, serving_site
from kvstore.admin.tokens import TokenBook
from kvstore.cli import app
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.testing.servers import free_port
from replication.exposition import MetricsAddress


@dataclass
class Files:
    """PEM files of a listener, and what a client of it trusts."""

    certificate: Path
    key: Path
    client_ca: Path
    trusting: ssl.SSLContext
    known: ssl.SSLContext
    """With a certificate of its own."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("prometheus@example.org")
    certificate, key, ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    server.cert_chain_pems[0].write_to_path(certificate)
    server.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    known = ssl.create_default_context(cafile=ca)
    client.configure_cert(known)
    return Files(certificate, key, ca, ssl.create_default_context(cafile=ca), known)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("kvstore_example", "One", registry=registry).set(1)
    return registry


@pytest.mark.parametrize("address", ["0.0.0.0:9400", "10.0.0.2:9400", "[::]:9400", "metrics.example.com:9400"])
def test_elsewhere_than_on_loopback_it_wants_certificates(address: str, files: Files) -> None:
    with pytest.raises(ConfigError, match=r"--metrics.*does not ask who they are"):
        MetricsAddress.of(address)
    with pytest.raises(ConfigError, match=r"--metrics.*does not ask who they are"):
        MetricsAddress.of(address, files.certificate, files.key)
    assert MetricsAddress.of(address, files.certificate, files.key, files.client_ca).port == 9400


@pytest.mark.parametrize("address", ["127.0.0.1:9400", "localhost:9400", "[::1]:9400"])
def test_on_loopback_it_wants_nothing(address: str) -> None:
    assert MetricsAddress.of(address).port == 9400


def test_what_is_no_address_or_lacks_its_other_half_is_refused(files: Files) -> None:
    for address in (
        "9400",
        ":9400",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:70000",
        "127.0.0.1:http",
        "http://127.0.0.1:1",
    ):
        with pytest.raises(ConfigError, match="not host:port"):
            MetricsAddress.of(address)
    for option, given in (
        ("--metrics-key", {"certificate": files.certificate}),
        ("--metrics-certificate", {"key": files.key}),
        ("--metrics-client-ca", {"client_ca": files.client_ca}),
    ):
        with pytest.raises(ConfigError, match=option):
            MetricsAddress.of("127.0.0.1:9400", **given)


def test_the_command_refuses_it_before_it_starts_anything(tmp_path: Path) -> None:
    arguments = ["up", "--set", f"node.directory={tmp_path / 'node'}", "--metrics", "0.0.0.0:9400"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2, refused.output
    assert "does not ask who they are" in refused.stderr
    assert "--metrics-client-ca" in refused.stderr


def test_an_address_or_file_that_cannot_be_used_is_named(registry: CollectorRegistry, files: Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = MetricsAddress.of(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"--metrics.*free port"), address.serving(registry):
            pass
    broken = MetricsAddress.of("127.0.0.1:9400", files.key, files.certificate)
    with pytest.raises(ConfigError, match="--metrics-certificate"), broken.serving(registry):
        pass


def test_over_tls_who_has_no_certificate_is_not_heard(registry: CollectorRegistry, files: Files) -> None:
    address = f"127.0.0.1:{free_port()}"
    with MetricsAddress.of(address, files.certificate, files.key, files.client_ca).serving(registry):
        silent = socket.create_connection(address.split(":"))  # who says nothing keeps nobody out
        with httpx.Client(verify=files.trusting) as nobody, pytest.raises(httpx.TransportError):
            nobody.get(f"https://{address}/metrics")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{address}/metrics")
        with httpx.Client(verify=files.known, timeout=30) as known:
            answer = known.get(f"https://{address}/metrics")
        silent.close()
    assert "kvstore_example 1.0" in answer.text
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://{address}/metrics")


def test_without_tls_it_is_served_in_the_open(registry: CollectorRegistry) -> None:
    address = f"127.0.0.1:{free_port()}"
    with MetricsAddress.of(address).serving(registry):
        assert "kvstore_example 1.0" in httpx.get(f"http://{address}/metrics", timeout=30).text


async def test_the_api_of_a_service_shows_them_to_who_has_a_token(registry: CollectorRegistry, tmp_path: Path) -> None:
    tokens, listen = tmp_path / "tokens.json", f"127.0.0.1:{free_port()}"
    _, text = TokenBook(tokens).create("prometheus", Role.VIEWER)
    loaded = load(None, [f"node.directory={tmp_path}", f"api.listen={listen}", f"api.tokens={tokens}"], environ={})
    async with serving_site(open_site(loaded, node=False, registry=registry)), httpx.AsyncClient() as http:
        url = f"http://{listen}/metrics"
        assert (await http.get(url)).status_code == 401
        bearer = {"Authorization": f"Bearer {text}"}
        assert "kvstore_example 1.0" in (await http.get(url, headers=bearer)).text
        openly = await http.get(url, headers={**bearer, "Accept": "application/openmetrics-text"})
        assert openly.text.endswith("# EOF\n")
