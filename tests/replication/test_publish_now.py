"""What was saved a moment ago is published: the nodes are asked first, and who did not answer is named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from region_cases import LLAMA, PAYLOAD_BYTES
from typer.testing import CliRunner

from kvstore.catalog import open_catalog
from kvstore.catalog.asking import Answering, Heard, ask_nodes
from kvstore.catalog.presence import Presence
from kvstore.cli import app
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium
from replication.keys import create_key, public_text
from replication.manifest import read_trusted
from replication.names import manifest_name


@dataclass
class Place:
    """A region with a node in it."""

    folder: Path
    bucket: str
    catalog: str
    client: PatientClient

    def save(self, first_token: int) -> list[BlockKey]:
        """A chain of three blocks, durable in the bucket, that an engine asked for before."""
        keyring = self.client.open_namespace(LLAMA, PAYLOAD_BYTES)
        keys = keyring.block_keys(chain_digests(range(first_token, first_token + 48), LLAMA.block_tokens))
        self.client.lookup(keys, timeout=30)
        self.put(LLAMA, [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)])
        return keys

    def put(self, namespace: Namespace, blocks: list[NewBlock]) -> None:
        reserved = self.client.reserve(namespace, blocks)
        for offset in reserved.offsets:
            assert offset is not None
            reserved.arena.slot(offset, PAYLOAD_BYTES)[:] = bytes(PAYLOAD_BYTES)
        keys = tuple(block.key for block in blocks)
        assert self.client.commit(keys, durable=Medium.OBJECT, timeout=30) == keys

    def publish(self, *settings: str) -> tuple[dict[str, Any], str]:
        """What ``kvstore region publish`` says, and what it notes."""
        arguments = ["-t", f"{self.folder}/regions.toml", "-r", "na", "--key", f"{self.folder}/na.pem", "--json"]
        done = CliRunner().invoke(app, ["region", "publish", *arguments, *(f"--set={one}" for one in settings)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    bucket, catalog = f"file://{tmp_path}/bucket", f"sqlite://{tmp_path}/catalog.db"
    public = public_text(create_key(tmp_path / "na.pem").public_key())
    (tmp_path / "regions.toml").write_text(f'[regions.na]\nurl = "{bucket}"\npublic_key = "{public}"\n')
    with (
        RunningNode(tmp_path, f"object.url={bucket}", f"catalog.url={catalog}") as node,
        PatientClient(node.socket) as client,
    ):
        yield Place(tmp_path, bucket, catalog, client)


def test_what_was_saved_a_moment_ago_is_published(place: Place) -> None:
    for number in (1, 2):
        place.save(1000 * number)
        said, notes = place.publish(f"object.url={place.bucket}", f"catalog.url={place.catalog}")
        assert said["blocks"] == 3 * number
        assert len(said["nodes"]["reported"]) == 1
        assert (said["nodes"]["silent"], notes) == ([], "")


def test_the_state_behind_a_prompt_is_published_with_it(place: Place) -> None:
    states = replace(LLAMA, layout="opaque:state", group=1)
    (state,) = place.client.open_namespace(states, PAYLOAD_BYTES).block_keys([bytes(32)])
    keys = place.save(1000)
    place.put(states, [NewBlock(state, keys[-1], len(keys))])
    for _ in range(2):
        found = place.client.lookup([*keys, state], timeout=30, states=1)
        assert found.blocks == 4
    place.publish(f"object.url={place.bucket}", f"catalog.url={place.catalog}")
    found = read_trusted((place.folder / "bucket" / manifest_name("na")).read_bytes()).blocks
    assert {block.key: block.namespace for block in found} == dict.fromkeys(keys, LLAMA.digest) | {state: states.digest}


def test_without_a_catalog_it_says_what_may_be_missing(place: Place) -> None:
    place.save(1000)
    said, notes = place.publish()
    assert said["nodes"] is None
    assert "may be missing" in notes


async def test_a_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db", "file:///bucket")
    documents = catalog.documents
    assert await ask_nodes(documents) == Heard((), ())
    reports: list[str] = []

    async def report() -> None:
        reports.append("quick")

    for name in ("quick", "dead"):
        node = Presence.here(name, "", "")
        await documents.put(node.document, node.pack(), 15.0)
    quick = Answering(documents, "quick", report)
    await quick.round()
    assert reports == ["quick"], "asked before it was there: harmless"

    async def rounds() -> None:
        while True:
            await quick.round()
            await asyncio.sleep(0.01)

    rounding = asyncio.create_task(rounds())
    assert await ask_nodes(documents, 3.0) == Heard(("quick",), ("dead",))
    rounding.cancel()
    assert reports == ["quick"] * 2, "once"
    await catalog.close()
