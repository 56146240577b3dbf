"""Tokens of an identity provider, against an issuer that listens and signs."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from api_site import Site, api_site
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from oidc_issuer import AUDIENCE, Issuer

from kvstore.admin.auth import Role
from kvstore.admin.jobs import JobKind, Running
from kvstore.admin.kinds import NoOptions
from kvstore.admin.oidc import role_names, role_of, tenant_of
from kvstore.admin.tokens import FAILURES, TokenBook
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.testing.servers import free_port


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def site(issuer: Issuer) -> Iterator[Site]:
    with api_site(f"api.oidc_issuer={issuer.url}", f"api.oidc_audience={AUDIENCE}") as site:
        yield site


def ask(site: Site, token: str, path: str = "/v1/whoami", **request: Any) -> httpx.Response:
    method = "POST" if request else "GET"
    return site.http.request(method, path, headers={"Authorization": f"Bearer {token}"}, **request)


def test_a_token_of_the_issuer_says_who_asks_and_their_role(issuer: Issuer, site: Site) -> None:
    who = ask(site, issuer.token()).json()
    assert (who["name"], who["role"], who["token"]) == ("ada (42)", "operator", True)
    assert ask(site, issuer.token(roles="admin")).json()["role"] == "admin"
    assert ask(site, issuer.token(), "/v1/blocks/delete", json={"keys": ["00" * 16]}).status_code == 403
    assert site.http.get("/v1/whoami").status_code == 401


def forged(issuer: Issuer, case: str) -> str:
    now = time.time()
    match case:
        case "expired":
            return issuer.token(exp=now - 120)
        case "not yet":
            return issuer.token(nbf=now + 600)
        case "without end":
            return issuer.token(exp=None)
        case "for another service":
            return issuer.token(aud="another")
        case "of another issuer":
            return issuer.token(iss="http://127.0.0.1:1")
        case "of nobody":
            return issuer.token(sub=None)
        case "without a role":
            return issuer.token(roles=["reader"])
        case "signed by another key":
            return issuer.token(generate_private_key(65537, 2048))
        case "by an unknown key":
            return issuer.token(generate_private_key(65537, 2048), kid="unknown")
        case "not signed":
            return jwt.encode(
                jwt.decode(issuer.token(), options={"verify_signature": False}), "", "none", {"kid": "first"}
            )
        case "signed with the public key as a secret":
            return with_public_key_as_secret(issuer)
        case _:
            head, body, signature = issuer.token().split(".")
            changed = base64.urlsafe_b64decode(body + "==").replace(b"operator", b"admin")
            return ".".join([head, base64.urlsafe_b64encode(changed).decode().rstrip("="), signature])


def with_public_key_as_secret(issuer: Issuer) -> str:
    """What fools a checker that lets the token choose: HS256 over what everybody can fetch."""
    import hashlib
    import hmac

    pem = issuer.keys["first"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first","typ":"JWT"}').rstrip(b"=")
    signed = head + b"." + issuer.token().split(".")[1].encode()
    mac = base64.urlsafe_b64encode(hmac.digest(pem, signed, hashlib.sha256)).rstrip(b"=")
    return (signed + b"." + mac).decode()


CASES = [
    "expired", "not yet", "without end", "for another service", "of another issuer", "of nobody", "without a role",
    "signed by another key", "by an unknown key", "not signed", "signed with the public key as a secret", "changed",
]  # fmt: skip


@pytest.mark.parametrize("cases", [CASES[:6], CASES[6:]])
def test_other_tokens_are_refused(issuer: Issuer, cases: list[str]) -> None:
    assert len(cases) < FAILURES
    with api_site(f"api.oidc_issuer={issuer.url}", f"api.oidc_audience={AUDIENCE}") as site:
        refused = {case: ask(site, forged(issuer, case)).status_code for case in cases}
        assert refused == dict.fromkeys(cases, 401)
        assert ask(site, issuer.token()).status_code == 200


def test_a_new_key_is_fetched_and_unknown_ones_do_not_make_us_ask_at_will(issuer: Issuer) -> None:
    with api_site(f"api.oidc_issuer={issuer.url}", f"api.oidc_audience={AUDIENCE}") as site:
        assert ask(site, issuer.token()).status_code == 200
        issuer.keys["second"] = generate_private_key(65537, 2048)
        assert ask(site, issuer.token(kid="second")).status_code == 200
        asked, another = issuer.asked, generate_private_key(65537, 2048)
        for _ in range(FAILURES - 1):
            ask(site, issuer.token(another, kid="unknown"))
        assert issuer.asked == asked


def test_own_tokens_work_beside_those_of_an_issuer_that_is_away(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    _, own = TokenBook(file).create("on-call", Role.OPERATOR)
    away = f"http://127.0.0.1:{free_port()}"
    with api_site(f"api.tokens={file}", f"api.oidc_issuer={away}", f"api.oidc_audience={AUDIENCE}") as site:
        assert ask(site, own).json()["name"] == "on-call"
        key = generate_private_key(65537, 2048)
        answer = ask(site, jwt.encode({"sub": "1"}, key, "RS256", {"kid": "first"}))
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:kvstore:problem:issuer-unavailable")


def test_jobs_that_delete_need_the_role_for_it(issuer: Issuer, site: Site) -> None:
    async def nothing(job: Running, options: NoOptions) -> dict[str, Any]:
        return {}

    site.api.site.jobs.register(JobKind("drop", "Deletes.", NoOptions, nothing, Role.ADMIN))
    wanted = {"kind": "drop", "options": {}}
    assert ask(site, issuer.token(), "/v1/jobs", json=wanted).status_code == 403
    job = ask(site, issuer.token(roles="admin"), "/v1/jobs", json=wanted)
    assert job.status_code == 202
    assert ask(site, issuer.token(), f"/v1/jobs/{job.json()['id']}/resume", json={}).status_code == 403


def test_what_a_claim_means() -> None:
    named = role_names(())
    assert role_of({"realm": {"roles": ["viewer", "admin"]}}, "realm.roles", named) is Role.ADMIN
    assert role_of({"https://x.y/roles": "viewer"}, "https://x.y/roles", named) is Role.VIEWER
    groups = role_names(["sre=operator", "a=b=admin"])
    assert role_of({"groups": ["sre"]}, "groups", groups) is Role.OPERATOR
    assert role_of({"groups": ["a=b"]}, "groups", groups) is Role.ADMIN
    for nothing in (None, 7, ["admin"], {"sre": 1}, [["sre"]]):
        assert role_of({"groups": nothing}, "groups", groups) is None
    assert role_of({}, "groups", groups) is None


def test_a_claim_of_a_tenant_names_one_or_opens_nothing() -> None:
    assert tenant_of({"tenant": "acme"}, "tenant") == "acme"
    assert tenant_of({"org": {"tenant": ["acme"]}}, "org.tenant") == "acme"
    assert tenant_of({"tenant": "*"}, "tenant") == ""
    for nothing in (None, "", [], 7, {"acme": 1}, ["acme", "globex"], ["*", "acme"], "a/b", "acme\n", "..", "a" * 65):
        assert tenant_of({"tenant": nothing}, "tenant") is None, nothing
    assert tenant_of({}, "tenant") is None


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["api.oidc_issuer=http://login.example.com", "api.oidc_audience=a"], "oidc_issuer"),
        (["api.oidc_issuer=https://login.example.com"], "oidc_audience"),
        (["api.oidc_issuer=https://l.example.com", "api.oidc_audience=a", "api.oidc_roles=sre"], "oidc_roles"),
    ],
)
def test_settings_that_would_let_others_in_are_refused(settings: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load(None, settings, environ={})
