"""Commands that look at prompts through the admin API, and what they say to whoever mistypes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api_site import BLOCKS, TOKENS, Site
from typer.testing import CliRunner, Result

from kvstore.cli import app


@pytest.fixture
def tokens(tmp_path: Path) -> list[str]:
    """Options that name the prompt which the site has."""
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(TOKENS))
    return ["--namespace", "org/toy", "--tokens", str(file)]


def command(site: Site, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--api", site.api.url])


def test_lookup_shows_what_each_tier_could_serve(shared_api: Site, tokens: list[str]) -> None:
    found = json.loads(command(shared_api, "lookup", *tokens, "--json").stdout)
    assert [(tier["medium"], tier["usable_blocks"]) for tier in found["tiers"]] == [("host", BLOCKS), ("disk", BLOCKS)]
    assert "usable tokens" in command(shared_api, "lookup", *tokens).stdout


def test_tree_shows_the_prompt(shared_api: Site, tokens: list[str]) -> None:
    root = json.loads(command(shared_api, "tree", *tokens, "--json").stdout)["root"]
    assert (root["start"], root["end"], root["asked"]) == (0, BLOCKS, True)
    shown = command(shared_api, "tree", *tokens).stdout
    assert f"0-{BLOCKS - 1}" in shown
    assert shared_api.keys[-1].hex() in shown


def test_models_are_listed_with_their_namespaces(shared_api: Site) -> None:
    (space,) = json.loads(command(shared_api, "models", "--json").stdout)
    assert space["fields"]["model"] == "org/toy"
    assert space["digest"] in command(shared_api, "models").stdout


def test_evict_takes_a_prompt_from_one_tier(own_api: Site, tokens: list[str]) -> None:
    done = command(own_api, "evict", *tokens, "--tier", "host", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"evicted": BLOCKS})
    held = {tier["medium"]: tier["blocks"] for tier in own_api.get("/v1/tiers")}
    assert held == {"host": 0, "disk": BLOCKS}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["jobs", "run", "nope"], 1, "There are: scrub."),
        (["jobs", "run", "scrub", "-o", "tiers=7"], 2, "Options of scrub: tiers"),
        (["lookup"], 2, "Give REQUEST, --key"),
        (["lookup", "--key", "zz"], 2, "Copy it from kvstore ls"),
        (["lookup", ""], 2, "request"),
        (["tenants", "create", "a/b"], 2, "NAME = 'a/b'"),
        (["tenants", "proof", "zz"], 2, "TOMBSTONE = 'zz'"),
    ],
)
def test_a_slip_is_answered_with_what_to_do(shared_api: Site, arguments: list[str], status: int, said: str) -> None:
    ran = command(shared_api, *arguments)
    assert (ran.exit_code, ran.stdout) == (status, ""), ran.output
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_pin_that_is_too_long_names_the_option(shared_api: Site) -> None:
    ran = CliRunner().invoke(app, ["pin", "r", "--for", "48h", "--socket", str(shared_api.node.socket)])
    assert ran.exit_code == 2
    assert "--for = '48h'" in ran.stderr
