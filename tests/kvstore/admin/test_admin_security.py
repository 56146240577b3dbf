"""Who may use the API: tokens, roles, TLS, and what is kept of it."""

from __future__ import annotations

import json
import ssl
import stat
from pathlib import Path

import httpx
import pytest
import trustme
from api_site import api_site

from kvstore.admin.auth import Role
from kvstore.admin.tokens import FAILURES, TokenBook
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.testing.admin import RunningApi

READ, OPERATE, DELETE = ("GET", "/v1/status"), ("PATCH", "/v1/policy"), ("POST", "/v1/blocks/delete")


@pytest.fixture
def book(tmp_path: Path) -> TokenBook:
    return TokenBook(tmp_path / "tokens.json")


def test_a_token_is_known_until_it_is_revoked_by_any_process(book: TokenBook, tmp_path: Path) -> None:
    token, text = book.create("ci", Role.VIEWER)
    elsewhere = TokenBook(tmp_path / "tokens.json")
    assert elsewhere.check(text) == token
    assert elsewhere.revoke(token.id)
    assert book.check(text) is None
    assert not book.revoke(token.id)


def test_wrong_texts_are_nobodys(book: TokenBook) -> None:
    _, text = book.create("ci", Role.ADMIN)
    other, _ = book.create("other", Role.VIEWER)
    flipped = text[:-1] + ("A" if text[-1] != "A" else "B")
    crossed = f"kvs_{other.id}_{text.split('_', 2)[2]}"[: len(text)]
    for wrong in ("", "kvs_", text[:-1], text + "A", flipped, crossed, text.upper(), "é" * 60):
        assert book.check(wrong) is None


def test_an_expired_token_is_nobodys(book: TokenBook) -> None:
    _, text = book.create("ci", Role.ADMIN, lifetime=-1)
    assert book.check(text) is None


def test_the_file_holds_no_token_and_is_its_owners_alone(book: TokenBook, tmp_path: Path) -> None:
    _, text = book.create("ci", Role.ADMIN)
    file = tmp_path / "tokens.json"
    assert text.split("_", 2)[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        TokenBook(file).tokens()


@pytest.mark.parametrize("content", ["", "[]", '{"tokens": [{"id": "x"}]}', "\x00"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="not a token file"):
        TokenBook(file).check("kvs_")


@pytest.mark.parametrize(
    ("role", "allowed"),
    [(Role.VIEWER, [READ]), (Role.OPERATOR, [READ, OPERATE]), (Role.ADMIN, [READ, OPERATE, DELETE])],
)
def test_each_role_may_do_what_it_covers_and_every_write_is_kept(
    tmp_path: Path, role: Role, allowed: list[object]
) -> None:
    file = tmp_path / "tokens.json"
    _, text = TokenBook(file).create("me", role)
    with api_site(f"api.tokens={file}") as site:
        directory = site.node.config.node.directory
        for method, path in (READ, OPERATE, DELETE):
            assert site.http.request(method, path, json={}).status_code == 401
            answer = site.http.request(method, path, json={}, headers={"Authorization": f"Bearer {text}"})
            refused = answer.status_code == 403
            assert refused != ((method, path) in allowed), answer.text
        entries = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]
    assert [(entry["who"], entry["method"], entry["status"] in (401, 403)) for entry in entries] == [
        (None, "PATCH", True),
        ("me", "PATCH", OPERATE not in allowed),
        (None, "POST", True),
        ("me", "POST", DELETE not in allowed),
    ]


def test_who_guesses_is_held_back(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    _, text = TokenBook(file).create("me", Role.VIEWER)
    with api_site(f"api.tokens={file}") as site:
        wrong = [site.http.get("/v1/status", headers={"Authorization": "Bearer kvs_guess"}) for _ in range(FAILURES)]
        assert {answer.status_code for answer in wrong} == {401}
        assert site.http.get("/v1/status", headers={"Authorization": f"Bearer {text}"}).status_code == 429
        assert site.http.get("/healthz").status_code == 200


def test_elsewhere_than_loopback_it_wants_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api\.tokens"):
        load(None, ["api.listen=0.0.0.0:7070"], environ={})
    load(None, ["api.listen=0.0.0.0:7070", f"api.tokens={tmp_path / 'tokens.json'}"], environ={})


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_over_tls_a_client_without_a_certificate_is_not_heard(authority: trustme.CA, tmp_path: Path) -> None:
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
    certificate, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    server.cert_chain_pems[0].write_to_path(certificate)
    server.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    settings = [f"api.tls_certificate={certificate}", f"api.tls_key={key}", f"api.client_ca={ca}"]
    trusting = ssl.create_default_context(cafile=ca)
    with RunningApi(tmp_path, *settings, node=False) as api:
        with httpx.Client(base_url=api.url, verify=trusting) as nobody, pytest.raises(httpx.TransportError):
            nobody.get("/healthz")
        with httpx.Client(base_url=api.url) as untrusting, pytest.raises(httpx.TransportError):
            untrusting.get("/healthz")
        client.configure_cert(trusting)
        with httpx.Client(base_url=api.url, verify=trusting) as known:
            assert known.get("/healthz").status_code == 200
