"""An API that wants certificates of its clients, and those that have one: commands, the Python client, other nodes' APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trustme
from api_site import BLOCKS, NAMESPACE, TOKENS, save_chain
from typer.testing import CliRunner

from kvstore.admin.client import AdminClient
from kvstore.admin.models.prompts import Prompt
from kvstore.admin.tls import towards_api
from kvstore.cli import app
from kvstore.errors import ConfigError, NodeUnavailable
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import RunningNode


@dataclass
class Site:
    """Two nodes, each of which asks the other one's API; and an operator's files."""

    urls: list[str]
    authority: Path
    certificate: Path


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    authority = trustme.CA()
    server, operator = authority.issue_cert("127.0.0.1"), authority.issue_cert("operator@example.org")
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(TemporaryDirectory(prefix="kvl-"))) for _ in range(2)]
        certificate, key, ca, own = (folders[0] / f"{name}.pem" for name in ("cert", "key", "ca", "own"))
        server.cert_chain_pems[0].write_to_path(certificate)
        server.private_key_pem.write_to_path(key)
        authority.cert_pem.write_to_path(ca)
        operator.private_key_and_cert_chain_pem.write_to_path(own)
        tls = [f"api.tls_certificate={certificate}", f"api.tls_key={key}", f"api.client_ca={ca}"]
        urls: list[str] = []
        for folder in folders:
            node = stack.enter_context(RunningNode(folder))
            save_chain(node.socket, TOKENS)
            peers = [f"api.peers={urls[0]}"] if urls else []
            urls.append(stack.enter_context(RunningApi(folder, *tls, *peers)).url)
        yield Site(urls, ca, own)


def test_nodes_show_each_other_their_own_certificates(site: Site) -> None:
    tls = towards_api(str(site.authority), str(site.certificate))
    with AdminClient(site.urls[1], tls=tls) as client:
        answer = client.router_lookup([Prompt(namespace=NAMESPACE.model, tokens=TOKENS)], timeout=10)
    assert answer.unanswered == []
    assert {node.url: node.tiers[0].usable_blocks for node in answer.prompts[0].nodes} == dict.fromkeys(
        site.urls, BLOCKS
    )


def test_commands_show_the_certificate_that_they_are_given(site: Site) -> None:
    command = ["top", "--once", "--json", "--api", site.urls[0]]
    files = {"KVSTORE_API_CA": str(site.authority), "KVSTORE_API_CERTIFICATE": str(site.certificate)}
    shown = CliRunner().invoke(app, command, env=files)
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["tiers"][0]["blocks"] == BLOCKS
    for missing in files:
        refused = CliRunner().invoke(app, command, env={**files, missing: ""})
        assert refused.exit_code == 3, missing
        assert "no admin API answers" in refused.stderr


def test_who_has_no_certificate_is_not_answered(site: Site) -> None:
    with (
        AdminClient(site.urls[0], tls=towards_api(str(site.authority), "")) as client,
        pytest.raises(NodeUnavailable),
    ):
        client.status()


def test_a_file_that_cannot_be_used_is_named(site: Site, tmp_path: Path) -> None:
    for authority, certificate, named in (
        (str(tmp_path / "none"), "", "KVSTORE_API_CA"),
        ("", str(tmp_path / "none"), "KVSTORE_API_CERTIFICATE"),
        ("", str(site.authority), "KVSTORE_API_CERTIFICATE"),
    ):
        with pytest.raises(ConfigError, match=named):
            towards_api(authority, certificate)
