"""Tenants through the admin API and ``kvstore tenants``, beside a running node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from kvstore.admin.auth import Role
from kvstore.admin.tokens import TokenBook
from kvstore.cli import app
from kvstore.errors import KVStoreError
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.testing.tenants import BLOCK_BYTES, MODEL, TenantSite, keys_of, loaded, prompt_of, save, tenant_site

PROMPT = prompt_of(5)


class Served:
    """A node with tenants and its API."""

    def __init__(self, site: TenantSite, node: RunningNode, api: RunningApi) -> None:
        self.site, self.node, self.api = site, node, api

    def ask(self, method: str, path: str, body: object = None, status: int = 200, **headers: str) -> Any:
        answer = httpx.request(method, f"{self.api.url}/v1/tenants{path}", json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    def run(self, *arguments: str, status: int = 0) -> Any:
        done = CliRunner().invoke(app, ["tenants", *arguments, "--api", self.api.url, "--json"])
        assert done.exit_code == status, done.output
        return json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tenant_site() as site, site.running() as node:
        with RunningApi(site.folder, f"tenants.book={site.folder / 'tenants.json'}") as api:
            yield Served(site, node, api)


def test_a_tenants_life_over_http(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    made = served.ask("POST", "", {"name": "acme", "uids": [4001], "quota": {"disk": 10 << 20}}, status=201)
    served.site.tokens["acme"] = made["token"]
    with served.site.engine("acme") as acme:
        theirs = save(acme, PROMPT)  # at once: the node has followed before the answer came
        found = served.ask("GET", "/acme")
        assert (found["served"], found["clients"], found["uids"]) == (True, 1, [4001])
        assert {tier["medium"]: tier["blocks"] for tier in found["tiers"]} == {"host": 5, "disk": 5}
        (disk,) = [tier for tier in found["tiers"] if tier["medium"] == "disk"]
        assert disk["capacity_bytes"] == 10 << 20
        changed = served.ask("PATCH", "/acme", {"quota": {"disk": 2 * disk["used_bytes"] // 5}})
        assert changed["uids"] == [4001]
        assert [tier["blocks"] for tier in changed["tiers"] if tier["medium"] == "disk"] == [2]

        purged = served.ask("POST", "/acme/purge")
        assert purged == {
            "name": "acme",
            "deleted": {"host": 5, "disk": 2},
            "left": {"host": 0, "disk": 0},
            "job": None,
        }
        assert acme.lookup(theirs).blocks == 0

    secret = served.ask("POST", "/acme/rotate-secret", {})["secret"]
    with served.site.engine("acme") as acme:
        wait_for(lambda: not set(reached(acme)) & set(theirs), 30)
        token = served.ask("POST", "/acme/rotate-token")["token"]
        with PatientClient(served.node.socket, token=lambda: made["token"]) as former, pytest.raises(KVStoreError):
            former.call("status")
        served.site.tokens["acme"] = token
    with served.site.engine("acme") as acme:
        assert acme.call("status")
        served.ask("DELETE", "/acme")
        wait_for(lambda: not reached(acme), 30)
    served.ask("GET", "/acme", status=404)
    kept = served.ask("GET", "")
    assert "acme" not in {tenant["name"] for tenant in kept["items"]}
    shown = "".join(capfd.readouterr()) + (served.site.folder / "audit.jsonl").read_text()
    for text in (made["secret"], secret, made["token"].split("_", 2)[2], token.split("_", 2)[2]):
        assert text not in shown


def reached(engine: PatientClient) -> list[Any]:
    try:
        return keys_of(engine, PROMPT)
    except KVStoreError:
        return []


def test_nothing_but_the_answer_to_its_making_has_a_secret(served: Served) -> None:
    made = served.ask("POST", "", {"name": "quiet"}, status=201)
    served.ask("PATCH", "/quiet", {"uids": [4002]})
    read = json.dumps([served.ask("GET", ""), served.ask("GET", "/quiet")])
    for text in (made["secret"], made["token"], made["token"].split("_", 2)[2]):
        assert text not in read


def test_making_one_twice_under_one_name_of_the_write_makes_one(served: Served) -> None:
    body, key = {"name": "once"}, {"Idempotency-Key": "make-once"}
    assert served.ask("POST", "", body, 201, **key) == served.ask("POST", "", body, 201, **key)
    served.ask("POST", "", body, status=409)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": ".."}, 422),
        ({"name": "a/b"}, 422),
        ({"name": "x", "uids": [-1]}, 422),
        ({"name": "x", "secret": "abc"}, 422),
        ({"name": "x", "shares": "nobody"}, 422),
        ({"name": "x", "quota": {"disk": -1}}, 422),
        ({"name": "x", "surprise": 1}, 422),
    ],
)
def test_what_does_not_fit_is_refused(served: Served, body: dict[str, Any], status: int) -> None:
    served.ask("POST", "", body, status=status)


def test_prompts_of_a_tenant_are_looked_up_with_its_keys(served: Served) -> None:
    served.site.tokens["looked"] = served.ask("POST", "", {"name": "looked"}, status=201)["token"]
    with served.site.engine("looked") as engine:
        save(engine, PROMPT)
    with httpx.Client(base_url=served.api.url) as http:
        spaces = http.get("/v1/namespaces").json()["items"]
        (digest,) = [space["digest"] for space in spaces if space["fields"]["tenant"] == "looked"]
        prompt = {"namespace": digest, "tokens": PROMPT}
        found = http.post("/v1/lookup", json=prompt).json()
        assert found["blocks"] == 5
        explained = http.post("/v1/explain", json=prompt).json()
        assert [(block["why"], block["where"]) for block in explained["blocks"]] == [("held", ["host", "disk"])] * 5
        assert http.delete(f"/v1/namespaces/{digest}/blocks").json()["deleted"] == {"host": 5, "disk": 5}


def test_the_same_by_command(served: Served, tmp_path: Path) -> None:
    made = served.run("create", "typed", "--uid", "4003", "--disk", "1MiB")
    served.site.tokens["typed"] = made["token"]
    (tmp_path / "secret").write_text(made["secret"])
    with served.site.engine("typed") as engine:
        save(engine, PROMPT)
    assert served.run("show", "typed")["quota"] == {"host": None, "disk": 1 << 20, "object": None}
    assert served.run("set", "typed", "--disk", "none", "--host", "2MiB")["quota"] == {
        "host": 2 << 20,
        "disk": None,
        "object": None,
    }
    assert "typed" in {tenant["name"] for tenant in served.run("list")}
    assert served.run("rotate", "typed", "secret", "--secret-file", str(tmp_path / "secret"), "--yes") == {
        "name": "typed",
        "secret": made["secret"],
    }
    assert served.run("rotate", "typed", "token", "--yes")["token"] != made["token"]
    assert served.run("purge", "typed", "--yes")["left"] == {"host": 0, "disk": 0}
    assert served.run("remove", "typed", "--yes") == {"name": "typed"}
    assert served.run("show", "typed", status=1) is None
    for command in (
        ["list"],
        ["create", "plain"],
        ["show", "plain"],
        ["purge", "plain", "--yes"],
        ["remove", "plain", "-y"],
    ):
        done = CliRunner().invoke(app, ["tenants", *command, "--api", served.api.url])
        assert done.exit_code == 0, done.output


def test_only_admins_change_tenants(tmp_path: Path) -> None:
    tokens = TokenBook(tmp_path / "tokens.json")
    roles = {role: tokens.create("t", role)[1] for role in Role}
    with tenant_site("acme") as site, site.running() as node:
        settings = (f"tenants.book={site.folder / 'tenants.json'}", f"api.tokens={tmp_path / 'tokens.json'}")
        with RunningApi(site.folder, *settings) as api:
            served = Served(site, node, api)
            for role, token in roles.items():
                may = {"Authorization": f"Bearer {token}"}
                served.ask("GET", "", **may)
                changes = [("PATCH", "/acme", {}), ("POST", "/acme/purge", None), ("POST", "/acme/rotate-token", None)]
                for method, path, body in changes:
                    served.ask(method, path, body, status=200 if role is Role.ADMIN else 403, **may)
            served.ask("GET", "", status=401)


def test_a_node_with_one_tenant_says_so(tmp_path: Path) -> None:
    with tenant_site() as site, RunningNode(site.folder), RunningApi(site.folder) as api:
        answer = httpx.get(f"{api.url}/v1/tenants")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:kvstore:problem:one-tenant")
        with PatientClient(site.folder / "node.sock") as client:
            assert loaded(client, keys_of(client, PROMPT)) == []
            assert client.open_namespace(MODEL, BLOCK_BYTES)
