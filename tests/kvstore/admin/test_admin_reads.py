"""What the API tells, of a real node."""

from __future__ import annotations

import json
import socket
import time

import httpx
import numpy as np
import pytest
from api_site import BLOCK_BYTES, BLOCKS, NAMESPACE, TOKENS, Site, api_site

from kvstore.testing.node import PatientClient, wait_for
from kvstore.warmth import WarmState, Warmth, write_warmth

PROMPT = {"namespace": "org/toy", "tokens": TOKENS}


def test_status_is_what_the_node_says(shared_api: Site) -> None:
    status = shared_api.get("/v1/status")
    assert {tier["medium"]: tier["blocks"] for tier in status["tiers"]} == {"host": BLOCKS, "disk": BLOCKS}
    assert status["counters"]["kvstore_published_blocks_total"] == BLOCKS
    assert shared_api.get("/v1/tiers/disk") == status["tiers"][1]
    assert "admin API" in [client["name"] for client in shared_api.get("/v1/clients")]
    assert "kvstore_published_blocks_total 5.0" in shared_api.http.get("/metrics").text


def test_many_readers_cost_the_node_one_call(shared_api: Site) -> None:
    def asked() -> set[str]:
        return {str(shared_api.get("/v1/status")["uptime_seconds"]) for _ in range(20)}

    started = time.monotonic()
    answers = asked()
    assert len(answers) <= 2 + (time.monotonic() - started) / 0.25


def test_health_is_not_readiness() -> None:
    with api_site() as site:
        assert site.get("/readyz")["ready"]
        site.node.stop()
        wait_for(lambda: site.http.get("/readyz").status_code == 503)  # a status is kept for a moment
        answer = site.http.get("/readyz")
        assert answer.json()["checks"][0]["name"] == "node"
        assert site.get("/healthz")["status"] == "ok"
        missing = site.http.get("/v1/status")
        assert missing.status_code == 503
        assert missing.headers["content-type"] == "application/problem+json"
        assert missing.json()["type"] == "urn:kvstore:problem:node-unavailable"
        assert "kvstore node" in missing.json()["remedy"]


def test_readiness_waits_for_warmth_where_it_is_asked_to() -> None:
    with api_site("api.ready_warm=0.8") as site:
        assert site.http.get("/readyz").status_code == 503
        assert site.http.get("/v1/warmth").status_code == 404
        for warm, status in ((70, 503), (80, 200)):
            warmth = Warmth(
                state=WarmState.RUNNING, started=1.0, updated=2.0, planned_blocks=1, planned_bytes=100, warm_bytes=warm
            )
            write_warmth(site.node.config.node.directory, warmth)
            assert site.http.get("/readyz").status_code == status
        assert site.get("/v1/warmth")["share"] == 0.8


def test_blocks_are_listed_page_by_page(shared_api: Site) -> None:
    listed: list[str] = []
    cursor = ""
    pages = 0
    while cursor or not pages:
        page = shared_api.get("/v1/blocks", tier="disk", namespace="org/toy", limit=2, cursor=cursor)
        listed += [block["key"] for block in page["items"]]
        cursor, pages = page["cursor"], pages + 1
    assert listed == sorted(key.hex() for key in shared_api.keys)
    assert pages == 3
    assert shared_api.get("/v1/blocks", tier="host", prefix=listed[3])["items"][0]["key"] == listed[3]


def test_one_block(shared_api: Site) -> None:
    block = shared_api.get(f"/v1/blocks/{shared_api.keys[1].hex()}")
    assert block["media"] == ["host", "disk"]
    assert (block["index"], block["parent"], block["length"]) == (1, shared_api.keys[0].hex(), BLOCK_BYTES)
    assert shared_api.http.get(f"/v1/blocks/{'0' * 32}").status_code == 404
    assert shared_api.http.get("/v1/blocks/nonsense").status_code == 422


def test_lookup_of_tokens_tells_each_tier(shared_api: Site) -> None:
    found = shared_api.post("/v1/lookup", PROMPT)
    assert (found["blocks"], found["block_tokens"]) == (BLOCKS, 16)
    assert [(tier["medium"], tier["usable_tokens"]) for tier in found["tiers"]] == [("host", 80), ("disk", 80)]
    other = shared_api.post("/v1/lookup", {**PROMPT, "tokens": [*TOKENS[:40], 9, *TOKENS[41:]]})
    assert [tier["usable_blocks"] for tier in other["tiers"]] == [2, 2]
    assert shared_api.post("/v1/lookup", {**PROMPT, "cache_salt": "x"})["tiers"][0]["usable_blocks"] == 0
    assert shared_api.post("/v1/lookup", {"key": shared_api.keys[2].hex()})["blocks"] == 3


def test_packed_tokens_name_the_same_prompt(shared_api: Site) -> None:
    prompt = {"namespace": "org/toy", "packed_tokens": np.array(TOKENS, dtype="<u4").tobytes().hex()}
    assert shared_api.post("/v1/lookup", prompt) == shared_api.post("/v1/lookup", PROMPT)
    found, wanted = (
        shared_api.post("/v1/router/lookup", {"prompts": [each], "timeout_seconds": 10}) for each in (prompt, PROMPT)
    )
    assert found == wanted
    pages = [shared_api.post("/v1/blocks/query", {"prompt": each}) for each in (prompt, PROMPT)]
    assert [item["key"] for item in pages[0]["items"]] == [item["key"] for item in pages[1]["items"]]


def test_lookup_does_not_count_as_a_use(shared_api: Site) -> None:
    before = shared_api.get(f"/v1/blocks/{shared_api.keys[0].hex()}")["hits"]
    shared_api.post("/v1/lookup", PROMPT)
    assert shared_api.get(f"/v1/blocks/{shared_api.keys[0].hex()}")["hits"] == before
    assert shared_api.get("/v1/hot")["items"] == []


def test_a_slower_tier_serves_what_the_faster_one_gave_up(own_api: Site) -> None:
    own_api.post("/v1/blocks/evict", {"tier": "host", "keys": [key.hex() for key in own_api.keys[3:]]})
    found = own_api.post("/v1/lookup", PROMPT)
    assert [tier["usable_blocks"] for tier in found["tiers"]] == [3, 5]


def test_router_lookup_answers_each_prompt(shared_api: Site) -> None:
    asked = [PROMPT, {"namespace": "nobody", "tokens": [1]}]
    answer = shared_api.post("/v1/router/lookup", {"prompts": asked, "timeout_seconds": 10})
    good, bad = answer["prompts"]
    assert good["nodes"][0]["url"] == shared_api.api.url
    assert good["nodes"][0]["tiers"][0]["usable_tokens"] == 80
    assert "nobody" in bad["problem"]


def test_blocks_of_a_prompt_page_by_page(shared_api: Site) -> None:
    first = shared_api.post("/v1/blocks/query", {"prompt": PROMPT, "limit": 3})
    rest = shared_api.post("/v1/blocks/query", {"prompt": PROMPT, "limit": 3, "cursor": first["cursor"]})
    keys = [item["key"] for item in first["items"] + rest["items"]]
    assert keys == [key.hex() for key in shared_api.keys]
    assert rest["cursor"] == ""


def test_a_miss_is_explained(shared_api: Site) -> None:
    found = shared_api.post("/v1/explain", {**PROMPT, "tokens": [*TOKENS[:64], *range(900, 916)]})
    assert found["usable_blocks"] == 4
    assert [block["why"] for block in found["blocks"]] == ["held"] * 4 + ["never_stored"]


def test_namespaces_and_models(shared_api: Site) -> None:
    (space,) = shared_api.get("/v1/namespaces")["items"]
    assert space["digest"] == NAMESPACE.digest.hex()
    assert shared_api.get(f"/v1/namespaces/{space['digest']}") == space
    (model,) = shared_api.get("/v1/models")
    assert (model["model"], model["namespaces"]) == ("org/toy", [space["digest"]])


def test_hot_prompts_are_those_asked_for_again(own_api: Site) -> None:
    for _ in range(2):
        with PatientClient(own_api.node.socket) as client:
            client.open_namespace(NAMESPACE, BLOCK_BYTES)
            client.lookup(own_api.keys)
    (prompt,) = own_api.get("/v1/hot", namespace="org/toy")["items"]
    assert (prompt["key"], prompt["tokens"]) == (own_api.keys[-1].hex(), 80)


def test_dry_run_says_what_admission_would(shared_api: Site) -> None:
    found = shared_api.post("/v1/policy/dry-run", PROMPT)
    (run,) = found["tiers"]["disk"]
    assert run["blocks"] == BLOCKS
    assert isinstance(run["admits"], bool)


def test_configuration_masks_secrets() -> None:
    with api_site("identity.secret=0123456789abcdef") as site:
        settings = {setting["name"]: setting for setting in site.get("/v1/config")}
        assert settings["identity.secret"]["value"] == "********"
        assert settings["api.listen"]["origin"] == "--set"
        assert "0123456789abcdef" not in site.http.get("/v1/config").text


def test_events_bring_snapshots(shared_api: Site) -> None:
    with shared_api.http.stream("GET", "/v1/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen = []
        for line in stream.iter_lines():
            if line.startswith("data:"):
                seen.append(json.loads(line.removeprefix("data:")))
            if len(seen) == 2:
                break
    assert seen[0]["parts"]["node"]["tiers"][0]["medium"] == "host"
    assert seen[1]["time"] > seen[0]["time"]
    assert shared_api.get("/v1/snapshot")["problems"] == {}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"origin": "https://evil.example"}, 403),
    ],
)
def test_foreign_pages_are_refused(shared_api: Site, headers: dict[str, str], status: int) -> None:
    answer = httpx.post(f"{shared_api.api.url}/v1/lookup", headers=headers, content=b"{}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_large_bodies_are_refused(shared_api: Site) -> None:
    host, _, port = shared_api.api.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        head = f"POST /v1/lookup HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99999999\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    for headers in ({}, {"Idempotency-Key": "large"}):
        endless = (b" " * (1 << 20) for _ in range(17))
        assert shared_api.http.post("/v1/lookup", content=endless, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "prompt",
    [
        {"tokens": [1, 2]},
        {"tokens": [-1], "namespace": "org/toy"},
        {"namespace": "org/toy"},
        {"tokens": [1], "key": "0" * 32, "namespace": "org/toy"},
        {"text": "hello", "namespace": "org/toy"},
        {"key": "0" * 32, "surprise": 1},
        {"packed_tokens": "01000000"},
        {"packed_tokens": "010000", "namespace": "org/toy"},
        {"packed_tokens": "0100000g", "namespace": "org/toy"},
        {"packed_tokens": "", "namespace": "org/toy"},
        {"packed_tokens": 1, "namespace": "org/toy"},
        {"packed_tokens": "01000000", "tokens": [1], "namespace": "org/toy"},
    ],
)
def test_a_prompt_that_cannot_be_is_refused(shared_api: Site, prompt: dict[str, object]) -> None:
    answer = shared_api.http.post("/v1/lookup", json=prompt)
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_a_cursor_of_somebody_else_is_refused(shared_api: Site) -> None:
    for path in ("/v1/blocks?tier=host&cursor=AAA", "/v1/jobs?cursor=!", "/v1/hot?cursor=%C3%A4"):
        assert shared_api.http.get(path).status_code == 422, path
