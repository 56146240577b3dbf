"""What a region adds to the admin API, over real buckets."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from region_cases import KEY, LLAMA, PAYLOAD_BYTES, chain, store, stored
from region_pair import Pair
from typer.testing import CliRunner, Result

from kvstore.admin.client import AdminClient
from kvstore.admin.models.jobs import Job, JobState
from kvstore.cli import app
from kvstore.errors import ConfigError
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import RunningNode
from kvstore.tiers.object import ObjectSettings
from replication.keys import public_text
from replication.links import Links
from replication.pause import read_pauses

pytestmark = pytest.mark.s3


@pytest.fixture
def service(pair: Pair, tmp_path: Path) -> Iterator[httpx.Client]:
    """The API of eu's region service, which has no node."""
    settings = ("region.name=eu", f"region.topology={pair.file}")
    with RunningApi(tmp_path, *settings, node=False) as api, httpx.Client(base_url=api.url) as client:
        yield client


def run(client: httpx.Client, kind: str) -> Job:
    with AdminClient(str(client.base_url)) as admin:
        return list(admin.watch_job(admin.run_job(kind).id))[-1]


async def test_a_region_without_a_node_shows_its_replication(pair: Pair, service: httpx.Client) -> None:
    assert service.get("/v1/status").status_code == 404
    assert service.get("/readyz").json()["checks"] == [{"name": "bucket", "ok": True, "detail": "answers"}]
    topology = service.get("/v1/replication/topology").json()
    assert topology["region"] == "eu"
    assert [flow["source"] for flow in topology["flows"]] == ["na"]
    status = service.get("/v1/replication").json()
    assert (status["mode"], status["sources"]["na"]["lag_seconds"]) == ("enforce", None)
    assert service.get("/v1/snapshot").json()["parts"]["replication"]["region"] == "eu"
    for secret in (pair.eu.secret_access_key, pair.na.secret_access_key):
        assert secret not in service.get("/v1/replication/topology").text


async def test_resync_copies_and_a_pause_keeps_it_from_that(
    pair: Pair, service: httpx.Client, random_source: random.Random
) -> None:
    blocks = chain(random_source, 3)
    store(pair.na, blocks)
    await pair.publish()
    planned = run(service, "replication-plan")
    assert planned.state is JobState.DONE
    assert planned.result is not None
    assert planned.result["flows"][0]["blocks"] == 3

    paused = service.post("/v1/replication/pause", json={"sources": ["na"]}).json()["paused"]
    assert "local" in paused["na"]
    held_back = run(service, "resync")
    assert held_back.result is not None
    assert "paused" in held_back.result["problems"]["na"]
    assert stored(pair.eu) == {}

    assert service.post("/v1/replication/resume", json={}).json()["paused"] == {}
    done = run(service, "resync")
    assert done.result is not None
    assert done.result["flows"][0]["copied"] == {"copied": 3}
    assert set(stored(pair.eu)) == {block.key for block in blocks}


def command(service: httpx.Client, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--api", str(service.base_url)])


async def test_a_region_is_steered_from_the_command_line(
    pair: Pair, service: httpx.Client, random_source: random.Random
) -> None:
    blocks = chain(random_source, 3)
    store(pair.na, blocks)
    await pair.publish()
    assert "never level" in command(service, "replication", "status").stdout
    assert "na" in command(service, "replication", "topology").stdout
    assert "na is paused" in command(service, "replication", "pause", "na").stderr
    assert command(service, "replication", "pause", "no such region").exit_code == 1
    assert "paused" in command(service, "replication", "status", "--json").stdout
    assert "Nothing is paused" in command(service, "replication", "resume").stderr
    planned = json.loads(command(service, "replication", "plan", "--json").stdout)
    assert planned["result"]["flows"][0]["blocks"] == 3
    assert command(service, "replication", "resync").exit_code == 0
    assert len(stored(pair.eu)) == 3
    assert "na" in command(service, "top").stdout
    asked = {"keys": "".join(block.key.hex() for block in blocks) + "00" * 16}
    (na,) = service.post("/v1/replication/holdings", json=asked).json()
    assert (na["region"], na["blocks"], na["prefix"], na["runs"]) == ("na", 3, 3, [[0, 3]])

    purged = command(service, "purge", "--key", blocks[1].key.hex(), "--everywhere", "--yes", "--json")
    assert purged.exit_code == 0, purged.output
    assert json.loads(purged.stdout)["result"]["deleted"] == 2
    assert set(stored(pair.eu)) == {blocks[0].key}
    assert command(service, "replication", "resync").exit_code == 0
    assert set(stored(pair.eu)) == {blocks[0].key}, "what was purged came back"
    assert command(service, "purge", "-n", LLAMA.model, "--everywhere", "--yes").exit_code == 0
    assert stored(pair.eu) == {}


async def test_only_sources_can_be_paused(pair: Pair, service: httpx.Client) -> None:
    assert service.post("/v1/replication/pause", json={"sources": ["eu"]}).status_code == 404
    async with Links.open([pair.eu]) as bucket:
        assert await read_pauses(bucket) == {}


async def test_a_file_of_pauses_that_cannot_be_read_pauses_nothing(eu: ObjectSettings) -> None:
    async with Links.open([eu]) as bucket:
        for body in (b"{", b"[]", b'{"na": {"since": 1}}', b'{"na": 1}'):
            await bucket.put("replication-pauses.json", body, create=False)
            assert await read_pauses(bucket) == {}


def test_observing_regions_copy_nothing(pair: Pair, tmp_path: Path) -> None:
    pair.write(mode="observe", na_key=public_text(KEY.public_key()))
    settings = ("region.name=eu", f"region.topology={pair.file}")
    with RunningApi(tmp_path, *settings, node=False) as api, httpx.Client(base_url=api.url) as client:
        done = run(client, "resync")
    assert done.state is JobState.DONE
    assert stored(pair.eu) == {}


def test_a_node_is_warmed_by_a_job(random_source: random.Random) -> None:
    with tempfile.TemporaryDirectory(prefix="kvw-") as name:
        folder = Path(name)
        bucket = f"object.url=file://{folder}/bucket"
        (folder / "bucket").mkdir()
        store(ObjectSettings(url=f"file://{folder}/bucket"), chain(random_source, 4))
        with (
            RunningNode(folder, bucket) as node,
            RunningApi(folder, bucket) as api,
            httpx.Client(base_url=api.url) as http,
        ):
            assert node.config.object.url
            done: Any = run(http, "warm")
            assert done.state is JobState.DONE, done.problem
            assert done.result["share"] == 1.0
            assert done.result["blocks"] == {"object": 4}
            assert http.get("/v1/warmth").json()["warm_bytes"] >= 4 * PAYLOAD_BYTES
            tiers = {tier["medium"]: tier["blocks"] for tier in http.get("/v1/tiers").json()}
            assert tiers["disk"] == 4
            assert http.get("/v1/models").json()[0]["model"] == LLAMA.model


def test_a_region_that_the_topology_lacks_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mars"):
        RunningApi(tmp_path, "region.name=mars", f"region.topology={pair.file}", node=False)
