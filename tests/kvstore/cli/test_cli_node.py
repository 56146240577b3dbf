"""Commands that talk to a node."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_site import BLOCK_BYTES, BLOCKS, NAMESPACE, Site, payload


def document(site: Site, *arguments: str) -> Any:
    result = site.run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def keys_listed(site: Site, *arguments: str) -> list[str]:
    return [block["key"] for block in document(site, "ls", *arguments)["disk"]["blocks"]]


def test_status_shows_fill_namespaces_and_counters(shared: Site) -> None:
    status = document(shared, "status")
    assert {tier["medium"]: tier["blocks"] for tier in status["tiers"]} == {"host": BLOCKS, "disk": BLOCKS}
    assert [space["fields"]["model"] for space in status["namespaces"]] == ["tiny-llama"]
    text = shared.run("status").stdout
    for expected in ("host", "disk", "16 MiB", "tiny-llama", "kvstore command", "kvstore_published_blocks"):
        assert expected in text


def test_ls_lists_filters_and_pages(shared: Site) -> None:
    ascending = sorted(key.hex() for key in shared.keys)
    listed = document(shared, "ls")
    assert [block["key"] for block in listed["host"]["blocks"]] == ascending
    assert {(b["length"], b["tokens"]) for b in listed["disk"]["blocks"]} == {(BLOCK_BYTES, 16)}
    assert keys_listed(shared, "--namespace", "tiny-llama", "--tier", "disk") == ascending
    assert keys_listed(shared, "--tier", "disk", "--limit", "2") == ascending[:2]
    assert keys_listed(shared, "--tier", "disk", "--after", ascending[1]) == ascending[2:]
    assert keys_listed(shared, "--tier", "disk", "--prefix", ascending[3][:8]) == [ascending[3]]
    text = shared.run("ls", "--tier", "disk", "--limit", "2")
    assert ascending[0] in text.stdout
    assert f"--after {ascending[1]}" in text.stderr


def test_get_writes_the_payload(shared: Site) -> None:
    file = shared.node.directory / "block"
    assert document(shared, "get", shared.keys[3].hex(), "-o", str(file))["length"] == BLOCK_BYTES
    assert file.read_bytes() == payload(3)


def test_get_of_an_unknown_block_is_a_problem_and_of_no_key_bad_input(shared: Site) -> None:
    assert shared.run("get", "00" * 16, "-o", str(shared.node.directory / "x")).exit_code == 1
    assert shared.run("get", "abc", "-o", str(shared.node.directory / "x")).exit_code == 2
    assert shared.run("get", shared.keys[0].hex(), "-o", str(shared.node.directory / "no" / "x")).exit_code == 2


def test_rm_deletes_keys_from_every_tier_and_then_the_namespace(site: Site) -> None:
    deleted = document(site, "rm", "--yes", site.keys[4].hex())["deleted"]
    assert deleted == {"host": 1, "disk": 1}
    deleted = document(site, "rm", "--yes", "--namespace", "tiny-llama")["deleted"]
    assert deleted == {"host": BLOCKS - 1, "disk": BLOCKS - 1}
    assert keys_listed(site) == []


def test_rm_asks_first(shared: Site) -> None:
    assert shared.run("rm", shared.keys[0].hex()).exit_code == 1
    assert len(keys_listed(shared)) == BLOCKS


@pytest.mark.parametrize(
    "arguments", [("rm",), ("rm", "00" * 16, "--namespace", "tiny-llama"), ("rm", "-y", "-n", "absent")]
)
def test_rm_refuses_what_is_not_one_choice(shared: Site, arguments: tuple[str, ...]) -> None:
    assert shared.run(*arguments).exit_code == 2


def damage_a_block(site: Site) -> None:
    """Flip bytes in the middle of one payload, wherever it is on disk."""
    for file in (site.node.data / "disk").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        start = data.find(payload(2))
        if start >= 0:
            with file.open("r+b") as opened:
                opened.seek(start + 1000)
                opened.write(b"damage")
            return
    raise AssertionError("the payload is in no file")


@pytest.mark.parametrize("running", [True, False])
def test_verify_finds_damage_and_quarantines_it(site: Site, running: bool) -> None:
    if not running:
        site.node.stop()
    clean = site.run("verify", "--tier", "disk", "--json")
    assert clean.exit_code == 0, clean.output
    assert json.loads(clean.stdout)["disk"]["checked"] == BLOCKS
    damage_a_block(site)
    found = site.run("verify", "--tier", "disk", "--json")
    assert found.exit_code == 1
    report = json.loads(found.stdout)["disk"]
    assert [bad["key"] for bad in report["bad"]] == [site.keys[2].hex()]
    assert report["checked"] == BLOCKS
    again = site.run("verify", "--tier", "disk")
    assert again.exit_code == 0, again.output
    assert f"{BLOCKS - 1}" in again.stdout


def test_verify_of_a_tier_that_the_node_lacks_is_bad_input(shared: Site) -> None:
    assert shared.run("verify", "--tier", "object").exit_code == 2


def test_status_of_a_node_that_no_engine_has_come_back_to(site: Site) -> None:
    site.node.stop()
    site.node.start()
    result = site.run("status")
    assert result.exit_code == 0, result.output
    assert "tiny-llama" in result.stdout


def test_no_node_is_status_3_and_says_how_to_start_one(site: Site) -> None:
    site.node.stop()
    for command in ("status", "ls"):
        result = site.run(command)
        assert result.exit_code == 3
        assert "kvstore node" in result.stderr
    assert site.run("verify", "--tier", "host").exit_code == 3


def test_doctor_is_content_with_a_running_node(shared: Site) -> None:
    findings = {finding["name"]: finding for finding in document(shared, "doctor")}
    assert findings["node"]["verdict"] == "ok"
    assert findings["disk"]["verdict"] == "ok"
    assert "GB/s" in findings["disk speed"]["finding"]


def test_hot_shows_the_prompts_that_are_asked_for_again(site: Site) -> None:
    assert "twice" in site.run("hot").stderr
    for _ in range(2):
        with site.node.client() as client:
            client.open_namespace(NAMESPACE, BLOCK_BYTES)
            client.lookup(site.keys)
    (prompt,) = document(site, "hot")
    assert prompt["key"] == site.keys[-1].hex()
    assert prompt["tokens"] == 16 * BLOCKS
    text = site.run("hot").stdout
    for expected in (prompt["key"], "tiny-llama", "host, disk"):
        assert expected in text
