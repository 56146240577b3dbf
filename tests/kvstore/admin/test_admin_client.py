"""The Python client and the commands on top of it, against a live API."""

from __future__ import annotations

import json
import socket
from itertools import islice

import numpy as np
import pytest
from api_site import BLOCKS, TOKENS, Site
from typer.testing import CliRunner, Result

from kvstore.admin.client import AdminClient
from kvstore.admin.models.base import TierName
from kvstore.admin.models.jobs import JobState
from kvstore.admin.models.policy import Mode
from kvstore.admin.models.prompts import Prompt
from kvstore.cli import app
from kvstore.errors import AdminRefused, DeadlineExceeded, NodeUnavailable
from kvstore.testing.servers import free_port

PROMPT = Prompt(namespace="org/toy", tokens=TOKENS)


def test_reads_give_models(shared_api: Site) -> None:
    with AdminClient(shared_api.api.url) as client:
        assert client.ready().ready
        assert client.status().tiers[0].blocks == BLOCKS
        assert [block.key for block in client.blocks(TierName.DISK)] == sorted(key.hex() for key in shared_api.keys)
        assert client.block(shared_api.keys[0].hex()).media == [TierName.HOST, TierName.DISK]
        assert client.lookup(PROMPT).tiers[0].usable_blocks == BLOCKS
        assert client.router_lookup([PROMPT], timeout=10).prompts[0].blocks == BLOCKS
        packed = Prompt(namespace="org/toy", packed_tokens=np.array(TOKENS, dtype="<u4").tobytes())
        assert client.router_lookup([packed], timeout=10) == client.router_lookup([PROMPT], timeout=10)
        assert client.explain(PROMPT).usable_blocks == BLOCKS
        assert [space.model for space in client.namespaces()] == ["org/toy"]
        assert [model.model for model in client.models()] == ["org/toy"]
        assert client.policy().mode is Mode.OBSERVE
        assert TierName.DISK in client.dry_run(PROMPT).tiers
        assert list(client.hot()) == []
        assert client.nodes()[0].url == shared_api.api.url
        assert "api.listen" in [setting.name for setting in client.config()]
        assert "node" in client.snapshot().parts
        assert len(list(islice(client.events(), 1))) == 1
        assert [kind.name for kind in client.job_kinds()] == ["scrub"]


def test_writes_are_done(own_api: Site) -> None:
    keys = [key.hex() for key in own_api.keys]
    with AdminClient(own_api.api.url) as client:
        assert client.pin(PROMPT, 60).pinned == BLOCKS
        assert client.pins()[0].blocks == BLOCKS
        assert client.unpin(keys[-1]).unpinned == BLOCKS
        assert client.evict(TierName.HOST, keys[4:]).evicted == 1
        assert [tier.ok for tier in client.verify(keys[0]).tiers] == [True, True]
        assert client.set_policy(Mode.ENFORCE).mode is Mode.ENFORCE
        assert client.delete(keys[4:]).deleted == {TierName.HOST: 0, TierName.DISK: 1}
        job = client.run_job("scrub", {"tiers": ["disk"]})
        assert list(client.watch_job(job.id))[-1].state is JobState.DONE
        assert [known.id for known in client.jobs()] == [job.id]
        (space,) = client.namespaces()
        assert client.delete_namespace(space.digest).deleted[TierName.DISK] == BLOCKS - 1


def test_problems_are_raised(shared_api: Site) -> None:
    with AdminClient(shared_api.api.url) as client:
        with pytest.raises(AdminRefused, match="no job") as refused:
            client.job("none")
        assert refused.value.status == 404
        with pytest.raises(AdminRefused, match="no job"):
            list(client.watch_job("none"))
    with AdminClient(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(NodeUnavailable, match="admin API"):
        client.status()


def test_an_api_that_takes_too_long_is_not_one_that_is_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with AdminClient(url, timeout=0.1) as client, pytest.raises(DeadlineExceeded, match="all the same"):
            client.delete(["00" * 16])


def command(site: Site, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--api", site.api.url])


def test_jobs_from_the_command_line(own_api: Site) -> None:
    assert "scrub" in command(own_api, "jobs", "kinds").stdout
    ran = command(own_api, "jobs", "run", "scrub", "-o", 'tiers=["disk"]', "--json")
    assert ran.exit_code == 0, ran.output
    job = json.loads(ran.stdout)
    assert job["result"]["tiers"]["disk"]["checked"] == BLOCKS
    listed = command(own_api, "jobs", "list").stdout
    assert job["id"] in listed
    assert "done" in listed
    assert "5 of 5 blocks" in command(own_api, "jobs", "show", job["id"][:-2]).stdout
    assert command(own_api, "jobs", "cancel", job["id"]).exit_code == 1
    assert command(own_api, "jobs", "resume", job["id"]).exit_code == 1
    assert command(own_api, "jobs", "show", "zzz").exit_code == 2


def test_policy_from_the_command_line(own_api: Site) -> None:
    assert command(own_api, "policy", "set", "enforce").exit_code == 0
    shown = command(own_api, "policy", "show").stdout
    assert "admission: enforce" in shown
    assert "likely" in shown
    assert command(own_api, "policy", "set", "never").exit_code == 2


def test_without_an_api_the_command_says_what_to_do() -> None:
    missing = CliRunner().invoke(app, ["jobs", "list"], env={"KVSTORE_API__LISTEN": ""})
    assert missing.exit_code == 2
    assert "api.listen" in missing.stderr
    wrong = CliRunner().invoke(app, ["jobs", "list", "--api", "127.0.0.1:7070"])
    assert (wrong.exit_code, "Write it as http://" in wrong.stderr) == (2, True)
    silent = CliRunner().invoke(app, ["jobs", "list", "--api", f"http://127.0.0.1:{free_port()}"])
    assert silent.exit_code == 3
