"""What the API changes, on a real node."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from api_site import BLOCKS, TOKENS, Site

from kvstore.admin.auth import Principal, Role
from kvstore.admin.problems import Problem

PROMPT = {"namespace": "org/toy", "tokens": TOKENS}


def usable(site: Site) -> list[int]:
    return [tier["usable_blocks"] for tier in site.post("/v1/lookup", PROMPT)["tiers"]]


def test_delete_takes_a_block_from_every_tier(own_api: Site) -> None:
    key = own_api.keys[-1].hex()
    deleted = own_api.http.delete(f"/v1/blocks/{key}")
    assert deleted.json() == {"deleted": {"host": 1, "disk": 1}}
    assert usable(own_api) == [BLOCKS - 1] * 2
    prompt = {"prompt": PROMPT}
    assert own_api.post("/v1/blocks/delete", prompt)["deleted"] == {"host": BLOCKS - 1, "disk": BLOCKS - 1}
    assert usable(own_api) == [0, 0]


def test_a_namespace_is_emptied(own_api: Site) -> None:
    (space,) = own_api.get("/v1/namespaces")["items"]
    deleted = own_api.http.delete(f"/v1/namespaces/{space['digest']}/blocks").json()
    assert deleted == {"deleted": {"host": BLOCKS, "disk": BLOCKS}}
    assert own_api.http.delete(f"/v1/namespaces/{'0' * 32}/blocks").status_code == 404


def test_evicting_a_prompt_leaves_the_other_tiers(own_api: Site) -> None:
    assert own_api.post("/v1/blocks/evict", {"tier": "host", "prompt": PROMPT}) == {"evicted": BLOCKS}
    assert usable(own_api) == [0, BLOCKS]
    nowhere = own_api.http.post("/v1/blocks/evict", json={"tier": "object", "prompt": PROMPT})
    assert nowhere.status_code == 422


def test_verify_finds_damage(own_api: Site) -> None:
    key = own_api.keys[2]
    own_api.post("/v1/blocks/evict", {"tier": "disk", "keys": [own_api.keys[1].hex()]})
    assert [tier["tier"] for tier in own_api.post(f"/v1/blocks/{own_api.keys[1].hex()}/verify")["tiers"]] == ["host"]
    for file in (own_api.node.config.node.directory / "disk").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if (at := data.find(bytes([2]) * 10_000)) >= 0:
            with file.open("r+b") as opened:
                opened.seek(at + 5_000)
                opened.write(b"damage")
    verified = own_api.post(f"/v1/blocks/{key.hex()}/verify")
    assert [(tier["tier"], tier["ok"]) for tier in verified["tiers"]] == [("host", True), ("disk", False)]
    assert own_api.get(f"/v1/blocks/{key.hex()}")["media"] == ["host"]


def test_pins_are_set_listed_and_ended(own_api: Site) -> None:
    answer = own_api.http.post("/v1/pins", json={"prompt": PROMPT, "seconds": 60})
    assert answer.status_code == 201
    assert answer.json()["pinned"] == BLOCKS
    (pin,) = own_api.get("/v1/pins")
    assert (pin["key"], pin["blocks"]) == (own_api.keys[-1].hex(), BLOCKS)
    assert own_api.http.delete(f"/v1/pins/{pin['key']}").json() == {"unpinned": BLOCKS}
    assert own_api.get("/v1/pins") == []
    assert own_api.http.post("/v1/pins", json={"prompt": PROMPT, "seconds": 1e6}).status_code == 422


def test_the_policy_changes_at_run_time(own_api: Site) -> None:
    assert own_api.get("/v1/policy")["mode"] == "observe"
    for mode in ("enforce", "off"):
        assert own_api.http.patch("/v1/policy", json={"mode": mode}).json()["mode"] == mode
        assert own_api.get("/v1/policy")["mode"] == mode
    assert own_api.http.patch("/v1/policy", json={"mode": "sometimes"}).status_code == 422


def test_a_write_with_a_key_is_done_once(own_api: Site) -> None:
    path, key = f"/v1/blocks/{own_api.keys[-1].hex()}", {"Idempotency-Key": "once"}
    first = own_api.http.delete(path, headers=key)
    again = own_api.http.delete(path, headers=key)
    assert again.json() == first.json() == {"deleted": {"host": 1, "disk": 1}}
    assert again.headers["idempotency-replayed"] == "true"
    assert own_api.http.delete(path).json() == {"deleted": {"host": 0, "disk": 0}}
    other = own_api.http.delete(f"/v1/blocks/{own_api.keys[0].hex()}", headers=key)
    assert other.status_code == 422
    assert usable(own_api) == [BLOCKS - 1] * 2
    wrong = {"Idempotency-Key": "wrong"}
    for _ in range(2):
        assert own_api.http.patch("/v1/policy", json={"mode": 1}, headers=wrong).status_code == 422


def test_two_at_once_with_a_key_are_one(own_api: Site) -> None:
    answers: list[httpx.Response] = []

    def delete() -> None:
        with httpx.Client(base_url=own_api.api.url) as client:
            body = {"prompt": PROMPT}
            answers.append(client.post("/v1/blocks/delete", json=body, headers={"Idempotency-Key": "both"}))

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 409}
    done = [answer.json() for answer in answers if answer.status_code == 200]
    assert done
    assert all(answer == {"deleted": {"host": BLOCKS, "disk": BLOCKS}} for answer in done)


ROLES = [
    ("GET", "/v1/status", None),
    ("POST", "/v1/jobs", {"kind": "none"}),
    ("DELETE", f"/v1/blocks/{'0' * 32}", None),
]


@pytest.mark.parametrize("role", list(Role))
def test_each_route_needs_its_role(own_api: Site, role: Role) -> None:
    async def somebody(_: Any) -> Principal:
        return Principal("somebody", role)

    own_api.api.site.authenticate = somebody
    refused = [own_api.http.request(method, path, json=body).status_code == 403 for method, path, body in ROLES]
    assert refused == {Role.VIEWER: [False, True, True], Role.OPERATOR: [False, False, True]}.get(role, [False] * 3)


def test_who_does_not_say_who_they_are_is_told_so_everywhere(own_api: Site) -> None:
    async def nobody(_: Any) -> Principal:
        raise Problem(401, "unauthenticated", "no token")

    own_api.api.site.authenticate = nobody
    document = own_api.get("/openapi.json")
    open_routes = set()
    for path, item in document["paths"].items():
        for method in item:
            answer = own_api.http.request(method, path.replace("{tier}", "host").replace("{key}", "0" * 32))
            if answer.status_code != 401 and answer.status_code != 422:
                open_routes.add(path)
    assert open_routes == {"/healthz", "/readyz"}
