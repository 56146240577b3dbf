"""The file of tenants."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.tenants.book import Operator, Quota, Tenant, TenantBook
from kvstore.tenants.credentials import TOKEN_FILE, engine_token, operator_token


@pytest.fixture
def book(tmp_path: Path) -> TenantBook:
    return TenantBook(tmp_path / "tenants.json")


def test_it_is_its_users_alone_and_holds_no_token(book: TenantBook) -> None:
    tenant, token = book.create("acme")
    assert stat.S_IMODE(book.path.stat().st_mode) == 0o600
    text = book.path.read_text()
    assert token.split("_", 2)[2] not in text
    assert tenant.secret in text
    assert tenant.secret not in repr(tenant) + str(tenant)
    assert tenant.token_sha256 not in repr(tenant)


def test_a_book_that_others_may_read_is_refused(book: TenantBook) -> None:
    book.create("acme")
    book.path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        TenantBook(book.path).tenants()


def test_a_book_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        TenantBook(tmp_path / "file" / "tenants.json").create("acme")


def test_who_a_client_is(book: TenantBook) -> None:
    acme, token = book.create("acme", uids=(1001,))
    globex, other = book.create("globex", uids=(1002, 0))
    for uid, shown, who in [
        (1001, "", acme), (1002, "", globex), (0, "", globex), (7, "", None),
        (7, token, acme), (1002, token, acme), (1001, other, globex),
        (1001, token + "x", None), (1001, token[:-1] + "!", None), (1001, "kvt_globex_" + token.partition("acme_")[2], None),
        (7, book.operator_token(), Operator.OPERATOR), (7, "kvo_" + "A" * 43, None),
    ]:  # fmt: skip
        assert book.whose(uid, shown) == who


def test_a_token_ends_when_it_is_rotated_in_every_process(book: TenantBook) -> None:
    _, token = book.create("acme")
    elsewhere = TenantBook(book.path)
    assert elsewhere.whose(7, token)
    new = book.rotate_token("acme")
    assert elsewhere.whose(7, token) is None
    assert elsewhere.whose(7, new) == book.get("acme")


def test_a_secret_is_rotated_and_shared_between_nodes(book: TenantBook, tmp_path: Path) -> None:
    tenant, token = book.create("acme")
    there, _ = TenantBook(tmp_path / "there.json").create("acme", secret=tenant.secret_bytes())
    assert there.secret == tenant.secret
    rotated = book.rotate_secret("acme")
    assert rotated.secret != tenant.secret
    assert book.whose(7, token) == rotated, "its token goes on"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda book: book.create("acme"), "such a tenant already"),
        (lambda book: book.create(".."), "pattern"),
        (lambda book: book.create("a/b"), "pattern"),
        (lambda book: book.create("other", uids=(1001,)), "that user is of acme"),
        (lambda book: book.create("other", shares="nobody"), "not a tenant with blocks of its own"),
        (lambda book: book.create("other", shares="subsidiary"), "not a tenant with blocks of its own"),
        (lambda book: book.create("other", secret=b"short"), "has 5 bytes"),
        (lambda book: book.change("subsidiary", uids=(1001,)), "that user is of acme"),
        (lambda book: book.change("subsidiary", quota=Quota(disk=1)), "has none of its own"),
        (lambda book: book.rotate_secret("subsidiary"), "has no secret"),
        (lambda book: book.change("nobody"), "no such tenant"),
        (lambda book: book.remove("acme"), "subsidiary shares its blocks"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    book: TenantBook, change: Callable[[TenantBook], object], problem: str
) -> None:
    acme, _ = book.create("acme", uids=(1001,))
    book.create("subsidiary", shares="acme")
    before = book.path.read_bytes()
    with pytest.raises(ConfigError, match=problem) as refused:
        change(book)
    assert acme.secret not in str(refused.value)
    assert book.path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"operator": "x", "tenants": []}', "\x00" * 100])
def test_a_file_that_is_no_book_is_refused_without_showing_it(book: TenantBook, text: str) -> None:
    book.create("acme")
    book.path.write_text(text)
    with pytest.raises(ConfigError, match=r"tenants\.book"):
        TenantBook(book.path).tenants()


def test_a_damaged_book_does_not_show_its_secrets(book: TenantBook) -> None:
    tenant, _ = book.create("acme")
    fields = json.loads(book.path.read_text())
    fields["tenants"][0]["uids"] = ["nobody"]
    fields["tenants"].append(fields["tenants"][0])
    book.path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as refused:
        TenantBook(book.path).tenants()
    assert tenant.secret not in str(refused.value)


def test_changes_at_once_are_all_kept(book: TenantBook) -> None:
    def create(number: int) -> Tenant:
        return TenantBook(book.path).create(f"t{number}")[0]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create, range(24)))
    assert {tenant.name for tenant in book.tenants()} == {tenant.name for tenant in made}


def test_an_engine_shows_what_its_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    assert engine_token() == ""
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"node\.token_file"):
        engine_token()
    (tmp_path / "token").write_text("kvt_acme_x\n")
    assert engine_token() == "kvt_acme_x"
    (tmp_path / "token").write_text("x" * 1000)
    with pytest.raises(ConfigError, match="too long"):
        engine_token()


def test_an_operator_is_who_can_read_the_book(book: TenantBook, tmp_path: Path) -> None:
    config = load(None, [f"tenants.book={book.path}"], environ={}).config
    assert operator_token(config) == ""
    book.create("acme")
    assert book.whose(os.geteuid(), operator_token(config)) is Operator.OPERATOR
    (tmp_path / "token").write_text("kvt_acme_x")
    assert operator_token(load(None, [f"node.token_file={tmp_path / 'token'}"], environ={}).config) == "kvt_acme_x"
