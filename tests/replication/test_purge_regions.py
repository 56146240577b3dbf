"""A tenant is purged in one of three live regions; the proof shows every region and node, and waits for one that is away."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry
from region_cases import EU_KEY, KEY
from region_pair import bucket_on

from kvstore import burials, demand
from kvstore.admin.client import AdminClient
from kvstore.admin.models.replication import PurgeProof
from kvstore.config import load
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.admin import RunningApi
from kvstore.testing.background import Background
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.testing.servers import S3Server
from kvstore.testing.shaping import Shape, shaped
from kvstore.tiers.object import ObjectSettings
from replication import receipts, topology
from replication.keys import public_text
from replication.service import Pace, serve
from replication.site import Site
from replication.topology import load_topology

pytestmark = pytest.mark.s3

QUICK = Pace(publish=0.2, replicate=0.2)
BLOCK_BYTES = 10_000
BLOCKS = 4
MODEL = Namespace(
    model="toy", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test", tenant="acme",
)  # fmt: skip
PROMPT = list(range(BLOCKS * MODEL.block_tokens))


class Service(Background):
    """A region's own service."""

    def __init__(self, site: Site, key: Ed25519PrivateKey) -> None:
        self._site, self._key = site, key
        super().__init__(f"service of {site.region}")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        task = asyncio.create_task(serve(self._site, self._key, stop, CollectorRegistry(), QUICK))
        yield
        stop.set()
        await task


class Region:
    """A bucket, a catalog, a node of the tenant, and the service when it runs."""

    def __init__(self, name: str, bucket: ObjectSettings, folder: Path, topology: Path, key: Ed25519PrivateKey) -> None:
        self.bucket, self.folder, self.key = bucket, folder, key
        self.settings = [
            f"object.url={bucket.url}", f"object.endpoint={bucket.endpoint}", f"object.access_key_id={bucket.access_key_id}",
            f"object.secret_access_key={bucket.secret_access_key}", f"catalog.url=sqlite://{folder}/catalog.db",
            f"region.name={name}", f"region.topology={topology}", "identity.tenant=acme", "identity.secret=a-secret-of-acme",
        ]  # fmt: skip
        self.site = Site(load(None, self.settings, environ={}).config, load_topology(topology), name)

    def node(self) -> RunningNode:
        return RunningNode(self.folder, *self.settings, "disk.enabled=false")

    def service(self) -> Service:
        return Service(self.site, self.key)


def keys_of(client: PatientClient) -> list[BlockKey]:
    return client.open_namespace(MODEL, BLOCK_BYTES).block_keys(chain_digests(PROMPT, MODEL.block_tokens))


def save(client: PatientClient) -> None:
    keys = keys_of(client)
    blocks = [NewBlock(key, parent, i) for i, (key, parent) in enumerate(zip(keys, [NO_PARENT, *keys], strict=False))]
    reserved = client.reserve(MODEL, blocks)
    for offset in reserved.offsets:
        assert offset is not None
        reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes(BLOCK_BYTES)
    client.commit(keys)
    for _ in range(3):
        client.lookup(keys)
    assert client.call("drain", timeout=50.0)["drained"]


def loaded(client: PatientClient) -> int:
    """Blocks that the node delivers."""
    acquired = client.acquire(keys_of(client), 10.0)
    client.release(keys_of(client)[: len(acquired.offsets)])
    return len(acquired.offsets)


def test_a_purge_is_proved_in_every_region_and_open_where_one_is_away(
    ministack_server: S3Server, far_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burials, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(demand, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(topology, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(receipts, "PATIENCE_SECONDS", 1.0)
    keys = {"eu": EU_KEY, "na": KEY, "ap": Ed25519PrivateKey.generate()}
    with ExitStack() as stack:
        buckets = {name: bucket_on(far_server if name == "ap" else ministack_server, name) for name in keys}
        link = stack.enter_context(shaped(buckets["ap"].endpoint, Shape()))
        tables = {
            name: f'[regions.{name}]\nurl = "{bucket.url}"\npublic_key = "{public_text(keys[name].public_key())}"\n'
            f'endpoints = ["{link.endpoint if name == "ap" else bucket.endpoint}"]\n'
            f'credentials_file = "{credentials(tmp_path / name, bucket)}"\n'
            for name, bucket in buckets.items()
        }
        regions = {}
        for name, bucket in buckets.items():
            # na does not hear of ap: it would wait for what that may have deleted, 10 s each round.
            known = ["eu", "na"] if name == "na" else ["eu", "na", "ap"]
            flow = f'[[flows]]\nfrom = "eu"\nto = {json.dumps(known[1:])}\n'
            file = tmp_path / f"{name}.toml"
            file.write_text('mode = "enforce"\n' + "".join(map(tables.__getitem__, known)) + flow)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"kv{name}-")))
            regions[name] = Region(name, bucket, folder, file, keys[name])
        clients = {}
        for name, region in regions.items():
            clients[name] = stack.enter_context(PatientClient(stack.enter_context(region.node()).socket))
        services = {name: stack.enter_context(region.service()) for name, region in regions.items()}
        save(clients["eu"])
        for client in clients.values():
            wait_for(lambda client=client: loaded(client) == BLOCKS)

        services["ap"].stop()
        link.cut()
        arguments = [
            "region",
            "purge",
            "-t",
            str(tmp_path / "eu.toml"),
            "-r",
            "eu",
            "--tenant",
            "acme",
            "--yes",
            "--json",
        ]
        arguments += [f"--set={one}" for one in regions["eu"].settings]
        purged = subprocess.run([sys.executable, "-m", "kvstore", *arguments], capture_output=True, check=True)
        tombstone = json.loads(purged.stdout)["tombstone"]
        api = stack.enter_context(RunningApi(regions["eu"].folder, *regions["eu"].settings, node=False))
        admin = stack.enter_context(AdminClient(api.url))

        def proof_of(*names: str) -> PurgeProof:
            """The first one that says that it is done in these regions: a region may be away when it is asked again."""
            found: list[PurgeProof] = []

            def done() -> bool:
                found.append(admin.purge_proof(tombstone))
                return all(found[-1].regions[name].done for name in names)

            wait_for(done)
            return found[-1]

        found = proof_of("eu", "na")
        for name in ("eu", "na"):
            region = found.regions[name]
            assert (region.known, region.left, len(region.receipts)) == (True, 0, 1)
            assert loaded(clients[name]) == 0
        assert (found.regions["ap"].done, found.done) == (False, False)
        assert found.regions["ap"].problem
        assert loaded(clients["ap"]) == BLOCKS, "it could not hear of it"

        link.heal()
        link.reset()
        stack.enter_context(regions["ap"].service())
        found = proof_of("eu", "na", "ap")
        assert found.done
        back = found.regions["ap"]
        assert (back.left, back.waiting, len(back.receipts)) == (0, [], 1)
        assert loaded(clients["ap"]) == 0


def credentials(file: Path, bucket: ObjectSettings) -> Path:
    file.write_text(f'access_key_id = "{bucket.access_key_id}"\nsecret_access_key = "{bucket.secret_access_key}"\n')
    return file
