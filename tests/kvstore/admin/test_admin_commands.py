"""Commands that steer through the admin API: ``top``, ``purge``, ``policy dry-run``, ``replication``."""

from __future__ import annotations

import json

import pytest
from api_site import BLOCKS, Site
from rich.console import Console
from typer.testing import CliRunner, Result

from kvstore.admin.models.status import Snapshot
from kvstore.cli import app
from kvstore.cli.figures import Observer
from kvstore.cli.top import draw
from kvstore.testing.servers import free_port


def command(site: Site, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--api", site.api.url])


def test_top_once_for_scripts(shared_api: Site) -> None:
    ran = command(shared_api, "top", "--once", "--json")
    assert ran.exit_code == 0, ran.output
    figures = json.loads(ran.stdout)
    host, disk = figures["tiers"]
    assert (host["name"], host["blocks"], disk["name"], disk["blocks"]) == ("host", BLOCKS, "disk", BLOCKS)
    assert host["capacity_bytes"] > host["used_bytes"] > 0
    assert (host["breaker"], disk["written"], figures["problems"]) == ("closed", 0.0, {})


def test_top_without_a_terminal_looks_once(shared_api: Site) -> None:
    ran = command(shared_api, "top")
    assert ran.exit_code == 0, ran.output
    assert "Hot prompts" in ran.stdout
    assert "disk" in ran.stdout


def test_top_without_an_api() -> None:
    ran = CliRunner().invoke(app, ["top", "--api", f"http://127.0.0.1:{free_port()}"])
    assert (ran.exit_code, "--api" in ran.stderr) == (3, True)


def snapshot(time: float, epoch: str, asked: float, found: float, read: float) -> Snapshot:
    tier = {"medium": "disk", "blocks": 7, "used_bytes": 50, "capacity_bytes": 100, "queued_bytes": 0, "quarantined": 0}
    counters = {
        "kvstore_asked_tokens_total": asked,
        "kvstore_found_tokens_total{tier=disk}": found,
        "kvstore_tier_bytes_total{operation=get,tier=disk}": read,
        "kvstore_breaker_state{state=open,tier=disk}": 1.0,
    }
    node = {
        "epoch": epoch, "uptime_seconds": 9.0, "draining": False, "clients": [], "namespaces": [], "tiers": [tier],
        "counters": counters,
    }  # fmt: skip
    return Snapshot(time=time, parts={"node": node}, problems={"catalog": "does not answer"})


def test_rates_are_of_the_last_seconds_and_of_one_run_of_a_node() -> None:
    observer = Observer()
    first = observer.look(snapshot(100.0, "a", 1000, 500, 0))
    assert (first.hit_ratio, first.hit_ratio_ever, first.tiers[0].read) == (None, 0.5, None)
    later = observer.look(snapshot(104.0, "a", 1100, 590, 8000))
    assert (later.hit_ratio, later.tiers[0].read, later.tiers[0].breaker) == (0.9, 2000.0, "open")
    much_later = observer.look(snapshot(113.0, "a", 1200, 590, 8000))
    assert (much_later.hit_ratio, much_later.tiers[0].read) == (0.0, 0.0)
    restarted = observer.look(snapshot(114.0, "b", 10, 10, 10))
    assert (restarted.hit_ratio, restarted.tiers[0].read) == (None, None)
    idle = observer.look(snapshot(115.0, "b", 10, 10, 10))
    assert (idle.hit_ratio, idle.tiers[0].read) == (None, 0.0)


def drawn(last: Snapshot, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(draw(Observer().look(last), width))
    return captured.get()


def test_what_is_wrong_is_drawn() -> None:
    text = drawn(snapshot(100.0, "a", 0, 0, 0), 80)
    assert "catalog: does not answer" in text
    assert "50%" in text
    assert "silent" in text


def test_a_region_without_a_node_is_drawn() -> None:
    source = {"lag_seconds": None, "blocks": 3, "paused": "", "problem": "the bucket does not answer"}
    replication = {"region": "eu", "mode": "enforce", "sources": {"na": source}}
    text = drawn(Snapshot(time=1.0, parts={"replication": replication}, problems={}), 160)
    assert "never level" in text
    assert "the bucket does not answer" in text


def test_purge_of_a_prompt_and_of_a_model(own_api: Site) -> None:
    assert command(own_api, "purge").exit_code == 2
    assert command(own_api, "purge", "--namespace", "no/such").exit_code == 2
    refused = CliRunner().invoke(app, ["purge", "-n", "org/toy", "--api", own_api.api.url], input="n\n")
    assert refused.exit_code == 1
    assert own_api.get("/v1/tiers")[0]["blocks"] == BLOCKS
    last = own_api.keys[-1].hex()
    prompt = command(own_api, "purge", "--key", last, "--yes", "--json")
    assert json.loads(prompt.stdout)["deleted"] == {"host": BLOCKS, "disk": BLOCKS}
    assert command(own_api, "purge", "-n", "org/toy", "--yes").exit_code == 0


def test_purge_everywhere_needs_a_bucket_to_leave_word_in(own_api: Site) -> None:
    ran = command(own_api, "purge", "-n", "org/toy", "--everywhere", "--yes")
    assert ran.exit_code == 1
    assert "purge" in ran.stderr
    assert command(own_api, "purge", "some request", "--everywhere", "--yes").exit_code == 2


def test_policy_dry_run(shared_api: Site) -> None:
    ran = command(shared_api, "policy", "dry-run", "--key", shared_api.keys[-1].hex(), "--json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["blocks"] == BLOCKS


def test_replication_where_there_is_none(shared_api: Site) -> None:
    ran = command(shared_api, "replication", "status")
    assert (ran.exit_code, "Error" in ran.stderr) == (1, True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("kvstore repl", "replication"), ("kvstore jobs ca", "cancel"), ("kvstore policy set en", "enforce")],
)
def test_shell_completion(typed: str, offered: str) -> None:
    asked = {"_KVSTORE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    ran = CliRunner().invoke(app, prog_name="kvstore", env=asked)
    assert offered in ran.stdout.split()
