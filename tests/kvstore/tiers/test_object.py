"""The object tier against real servers: other nodes, damage, outages, wrong settings, servers that pretend."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import obstore
import pytest

from kvstore.errors import BlockCorrupt, BlockNotFound, ConfigError, TierUnavailable
from kvstore.identity import BlockKey, Namespace
from kvstore.testing.blocks import NAMESPACE, aligned_buffer, random_block, random_chain, seal
from kvstore.testing.conformance import PAYLOAD_BYTES, assert_holds, put
from kvstore.testing.servers import S3Server, ministack
from kvstore.tiers.base import PutResult
from kvstore.tiers.object import Bucket, ObjectSettings, ObjectTier, survey
from kvstore.tiers.object.names import NAMESPACES, QUARANTINE, block_name
from kvstore.tiers.object.objects import Objects
from kvstore.tiers.wrappers import Breaker, BreakerState

pytestmark = pytest.mark.s3

LLAMA = Namespace(
    model="llama", weights="1", dtype="bfloat16", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="canonical:kv_head_token_layer",
)  # fmt: skip


@asynccontextmanager
async def listed(settings: ObjectSettings) -> AsyncIterator[ObjectTier]:
    """The tier, when its listing is complete."""
    tier = await ObjectTier.open(settings)
    try:
        await tier.ready.wait()
        yield tier
    finally:
        await tier.close()


@pytest.fixture
def source() -> random.Random:
    return random.Random(5)


def names_below(settings: ObjectSettings, folder: str) -> list[str]:
    store = Objects.connect(settings).store
    return [meta["path"] for page in obstore.list(store, folder) for meta in page]


def overwrite(settings: ObjectSettings, key: BlockKey, body: bytes) -> None:
    obstore.put(Objects.connect(settings).store, block_name(NAMESPACE, key), body)


class TestOtherNodes:
    async def test_a_block_stored_by_another_node_is_present(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(s3_settings) as here, listed(s3_settings) as there:
            assert await put(there, block) is PutResult.STORED
            assert block.key not in here.keys()
            assert await put(here, block) is PutResult.PRESENT
            await assert_holds(here, block)
            assert here.stat(block.key) == dataclasses.replace(
                there.stat(block.key), accessed=here.stat(block.key).accessed
            )

    async def test_a_probe_finds_what_another_node_stored(
        self, ministack_settings: ObjectSettings, source: random.Random
    ) -> None:
        chain = [
            seal(block.key, block.payload, parent=block.header.parent, index=block.header.index, namespace=LLAMA.digest)
            for block in random_chain(source, 5, PAYLOAD_BYTES)
        ]
        async with listed(ministack_settings) as here, listed(ministack_settings) as there:
            await here.put_namespace(LLAMA)
            for block in chain[:3]:
                await put(there, block)
            assert await here.probe(block.key for block in chain) == 3
            assert set(here.keys()) == {block.key for block in chain[:3]}
            await assert_holds(here, chain[2])

    async def test_absence_is_remembered_for_a_while(
        self, ministack_settings: ObjectSettings, source: random.Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        block = seal(block.key, block.payload, namespace=LLAMA.digest)
        async with listed(ministack_settings) as here, listed(ministack_settings) as there:
            await here.put_namespace(LLAMA)
            assert await here.probe([block.key]) == 0
            await put(there, block)
            assert await here.probe([block.key]) == 0, "asked again too soon"
            now = survey.time.monotonic()
            monkeypatch.setattr(survey.time, "monotonic", lambda: now + survey.ABSENT_SECONDS)
            assert await here.probe([block.key]) == 1

    async def test_of_two_nodes_that_store_a_block_at_once_one_wins(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        blocks = [random_block(source, 4096) for _ in range(60)]
        async with listed(s3_settings) as one, listed(s3_settings) as two:
            results = await asyncio.gather(*(put(tier, block) for block in blocks for tier in (one, two)))
            pairs = [sorted(result.value for result in results[i : i + 2]) for i in range(0, len(results), 2)]
            assert pairs == [["present", "stored"]] * 60
            for block in blocks:
                await assert_holds(one, block)
                await assert_holds(two, block)


class TestListing:
    async def test_thousands_of_objects_are_learnt(
        self, ministack_settings: ObjectSettings, source: random.Random
    ) -> None:
        store = Objects.connect(ministack_settings).store
        block = random_block(source, 1)
        keys = {BlockKey(source.randbytes(16)) for _ in range(2500)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: obstore.put(store, block_name(NAMESPACE, key), bytes(block.envelope)), keys))
        obstore.put(store, "blocks/v1/README", b"no block")
        obstore.put(store, f"blocks/v1/{NAMESPACE.hex()}/zz/unknown", b"no block")
        async with listed(ministack_settings) as tier:
            assert set(tier.keys()) == keys
            assert tier.stats().used_bytes == 2500 * len(block.envelope)

    async def test_the_index_is_bounded(self, ministack_settings: ObjectSettings, source: random.Random) -> None:
        settings = dataclasses.replace(ministack_settings, max_blocks=8)
        blocks = [random_block(source, 100) for _ in range(20)]
        async with listed(settings) as tier:
            for block in blocks:
                assert await put(tier, block) is PutResult.STORED
                assert len(tier.keys()) <= 8
            await assert_holds(tier, blocks[-1])
            assert await put(tier, blocks[0]) is PutResult.PRESENT, "forgotten, not deleted"

    async def test_a_capped_tier_evicts_tails_first_after_a_restart(
        self, ministack_settings: ObjectSettings, source: random.Random
    ) -> None:
        chain = random_chain(source, 8, PAYLOAD_BYTES)
        capacity = 8 * len(chain[0].envelope)
        settings = dataclasses.replace(ministack_settings, capacity_bytes=capacity)
        async with listed(settings) as tier:
            for block in reversed(chain):  # the tail is oldest: age alone would get the order right for no reason
                await put(tier, block)
        async with listed(settings) as tier:
            async with asyncio.timeout(30):
                while any(tier.stat(block.key).tokens == 0 for block in chain):
                    await asyncio.sleep(0.01)
            for number in range(3):
                assert await put(tier, random_block(source, PAYLOAD_BYTES)) is PutResult.STORED
                assert [block.key in tier.keys() for block in chain] == [True] * (7 - number) + [False] * (number + 1)
                assert tier.stats().used_bytes <= capacity


class TestDamage:
    async def test_a_bad_block_is_kept_for_inspection(self, s3_settings: ObjectSettings, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(s3_settings) as tier:
            await put(tier, block)
            overwrite(s3_settings, block.key, bytes(len(block.envelope)))
            with pytest.raises(BlockCorrupt, match="magic"):
                await assert_holds(tier, block)
            (bad,) = tier.bad_blocks
            assert (bad.key, bad.namespace) == (block.key, NAMESPACE)
            assert "magic" in bad.reason
        (kept,) = names_below(s3_settings, QUARANTINE)
        assert block.key.hex() in kept
        assert names_below(s3_settings, "blocks/v1") == []

    async def test_a_block_of_another_namespace_is_bad(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        other = seal(block.key, block.payload, namespace=LLAMA.digest)
        async with listed(s3_settings) as tier:
            await put(tier, block)
            overwrite(s3_settings, block.key, bytes(other.envelope))
            with pytest.raises(BlockCorrupt, match="namespace"):
                await assert_holds(tier, block)

    async def test_a_stump_in_the_listing_is_no_block_and_heals(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        overwrite(s3_settings, block.key, bytes(block.envelope)[:5000])
        async with listed(s3_settings) as tier:
            assert block.key not in tier.keys()
            assert tier.stats().quarantined == 1
            assert await put(tier, block) is PutResult.STORED
            await assert_holds(tier, block)

    async def test_a_stump_that_appears_later_is_overwritten(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(s3_settings) as tier:
            overwrite(s3_settings, block.key, bytes(block.envelope)[:5000])
            assert await put(tier, block) is PutResult.STORED
            await assert_holds(tier, block)

    async def test_an_object_that_was_removed_is_a_miss(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(s3_settings) as tier:
            await put(tier, block)
            obstore.delete(Objects.connect(s3_settings).store, block_name(NAMESPACE, block.key))
            with pytest.raises(BlockNotFound):
                await assert_holds(tier, block)
            assert block.key not in tier.keys()
            assert tier.stats().used_bytes == 0
            assert await put(tier, block) is PutResult.STORED

    async def test_what_another_node_healed_meanwhile_is_not_taken_away(
        self, s3_settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        objects = Objects.connect(s3_settings)
        name = block_name(NAMESPACE, block.key)
        await objects.put(name, b"bad", create=True)
        bad = await objects.head(name)
        assert bad is not None
        await objects.put(name, block.envelope, create=False)
        await objects.move(name, f"{QUARANTINE}/x", bad.etag)
        healed = await objects.head(name)
        assert healed is not None
        assert healed.size == len(block.envelope)
        await objects.close()


class TestOutage:
    """On a server of its own, so that no other test meets the outage."""

    @pytest.fixture
    def server(self) -> Iterator[S3Server]:
        with ministack() as server:
            yield server

    @pytest.fixture
    def settings(self, server: S3Server) -> ObjectSettings:
        settings = ObjectSettings(
            url="s3://bucket",
            endpoint=server.endpoint,
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
            request_timeout=3.0,
            connect_timeout=3.0,
            create_bucket=True,
        )
        Bucket(settings).check()
        return settings

    @pytest.mark.parametrize("how", ["stop", "freeze"])
    async def test_calls_fail_and_work_again_by_themselves(
        self, server: S3Server, settings: ObjectSettings, source: random.Random, how: str
    ) -> None:
        before, after = random_block(source, PAYLOAD_BYTES), random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as tier:
            await put(tier, before)
            await tier.put_namespace(LLAMA)
            server.stop() if how == "stop" else server.freeze()
            with pytest.raises(TierUnavailable):
                await assert_holds(tier, before)
            with pytest.raises(TierUnavailable):
                await put(tier, after)
            with pytest.raises(TierUnavailable):
                await tier.probe([after.key])
            server.restart() if how == "stop" else server.thaw()
            await assert_holds(tier, before)
            # A frozen server may have kept a part of the upload that was cut off: then it is found out, dropped and healed.
            while True:
                assert await put(tier, after) in (PutResult.STORED, PutResult.PRESENT)
                try:
                    await assert_holds(tier, after)
                except (BlockCorrupt, BlockNotFound):
                    continue
                break

    async def test_what_could_not_be_deleted_stays_listed(
        self, server: S3Server, settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as tier:
            await put(tier, block)
            server.stop()
            with pytest.raises(TierUnavailable):
                await tier.delete([block.key])
            assert block.key in tier.keys()
            assert tier.stats().used_bytes == len(block.envelope)
            server.restart()
            await assert_holds(tier, block)
            assert await tier.delete([block.key]) == 1

    async def test_a_breaker_stops_offering_blocks_until_the_server_is_back(
        self, server: S3Server, settings: ObjectSettings, source: random.Random
    ) -> None:
        now = 0.0
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as inner:
            tier = Breaker(inner, failures=2, clock=lambda: now)
            await put(tier, block)
            server.stop()
            for _ in range(2):
                with pytest.raises(TierUnavailable):
                    await assert_holds(tier, block)
            assert tier.state is BreakerState.OPEN
            assert block.key not in tier.keys()
            server.restart()
            now = 5.0
            assert block.key in tier.keys()
            await assert_holds(tier, block)
            assert tier.state is BreakerState.CLOSED

    async def test_a_tier_opened_during_an_outage_finds_its_blocks_later(
        self, server: S3Server, settings: ObjectSettings, source: random.Random
    ) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as tier:
            await put(tier, block)
        server.stop()
        tier = await ObjectTier.open(settings)
        try:
            assert tier.features is None
            server.restart()
            async with asyncio.timeout(30):
                await tier.ready.wait()
            assert tier.features is not None
            await assert_holds(tier, block)
        finally:
            await tier.close()

    async def test_a_capped_tier_stores_nothing_before_it_knows_what_is_there(
        self, server: S3Server, settings: ObjectSettings, source: random.Random
    ) -> None:
        server.stop()
        tier = await ObjectTier.open(dataclasses.replace(settings, capacity_bytes=1 << 20))
        try:
            with pytest.raises(TierUnavailable):
                await put(tier, random_block(source, PAYLOAD_BYTES))
        finally:
            await tier.close()


class TestSettings:
    async def test_a_wrong_secret_is_named(self, radosgw_server: S3Server) -> None:
        settings = ObjectSettings(
            url="s3://bucket",
            endpoint=radosgw_server.endpoint,
            access_key_id=radosgw_server.access_key,
            secret_access_key="not the secret",
        )
        with pytest.raises(ConfigError, match=r"object\.access_key_id") as caught:
            await ObjectTier.open(settings)
        assert "not the secret" not in str(caught.value)

    async def test_an_unknown_key_is_named(self, s3_settings: ObjectSettings) -> None:
        with pytest.raises(ConfigError, match=r"object\.access_key_id"):
            await ObjectTier.open(dataclasses.replace(s3_settings, access_key_id="nobody"))

    async def test_a_missing_bucket_is_named_or_created(self, s3_settings: ObjectSettings) -> None:
        settings = dataclasses.replace(s3_settings, url=s3_settings.url.replace("s3://test", "s3://none"))
        with pytest.raises(ConfigError, match="no such bucket"):
            await ObjectTier.open(settings)
        async with listed(dataclasses.replace(settings, create_bucket=True)) as tier:
            assert not tier.keys()

    async def test_credentials_come_from_the_environment(
        self, radosgw_server: S3Server, s3_settings: ObjectSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_settings.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_settings.secret_access_key)
        async with listed(dataclasses.replace(s3_settings, access_key_id="", secret_access_key="")) as tier:
            assert tier.features is not None

    async def test_given_credentials_are_not_joined_with_the_environment(
        self, s3_settings: ObjectSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
        async with listed(s3_settings) as tier:
            assert tier.features is not None

    async def test_no_credentials_at_all_are_named(
        self, s3_settings: ObjectSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(ConfigError, match="no credentials"):
            await ObjectTier.open(dataclasses.replace(s3_settings, access_key_id="", secret_access_key=""))

    async def test_a_private_authority_is_trusted_when_named(self, source: random.Random) -> None:
        with ministack(tls=True) as server:
            settings = ObjectSettings(
                url="s3://bucket",
                endpoint=server.endpoint,
                access_key_id=server.access_key,
                secret_access_key=server.secret_key,
                ca_file=server.ca_file,
                create_bucket=True,
            )
            block = random_block(source, PAYLOAD_BYTES)
            async with listed(settings) as tier:
                await put(tier, block)
                await assert_holds(tier, block)
            stranger = await ObjectTier.open(dataclasses.replace(settings, ca_file=None))
            try:
                assert stranger.features is None
                with pytest.raises(TierUnavailable):
                    await put(stranger, block)
            finally:
                await stranger.close()


class TestBucket:
    def test_lifecycle_rules_join_those_of_others(self, s3_settings: ObjectSettings) -> None:
        bucket = Bucket(s3_settings)
        assert bucket.lifecycle() == []
        bucket.set_lifecycle()
        bucket.set_lifecycle()
        rules = {rule["ID"]: rule for rule in bucket.lifecycle()}
        assert rules.keys() == {"kvstore-quarantine some/prefix", "kvstore-uploads some/prefix"}
        assert rules["kvstore-quarantine some/prefix"]["Filter"]["Prefix"] == "some/prefix/quarantine/"
        other = dataclasses.replace(s3_settings, url=s3_settings.url.replace("some/prefix", "elsewhere"))
        Bucket(other).set_lifecycle()
        assert len(bucket.lifecycle()) == 4

    def test_a_bucket_that_we_make_gets_our_rules(self, s3_settings: ObjectSettings) -> None:
        made = dataclasses.replace(
            s3_settings, url=f"s3://made-{uuid.uuid4().hex[:12]}/some/prefix", create_bucket=True
        )
        Bucket(made).check()
        assert len(Bucket(made).lifecycle()) == 2

    async def test_features_are_what_the_server_does(self, s3_server: S3Server, s3_settings: ObjectSettings) -> None:
        async with listed(s3_settings) as tier:
            assert tier.features is not None
            assert tier.features.conditional_put
            assert tier.features.ranged_get
            assert tier.features.checksums == (s3_server.name == "ministack")
        assert names_below(s3_settings, "scratch") == []


class TestNamespaces:
    async def test_they_are_written_down_and_read_back(self, s3_settings: ObjectSettings) -> None:
        qwen = dataclasses.replace(LLAMA, model="qwen")
        async with listed(s3_settings) as tier:
            await tier.put_namespace(LLAMA)
            await tier.put_namespace(qwen)
        store = Objects.connect(s3_settings).store
        obstore.put(store, f"{NAMESPACES}/{bytes(16).hex()}.json", b"not json")
        obstore.put(store, f"{NAMESPACES}/{bytes(15).hex()}01.json", b'{"model": "half"}')
        obstore.put(store, f"{NAMESPACES}/{bytes(15).hex()}02.json", b"")
        async with listed(s3_settings) as tier:
            assert await tier.namespaces() == {LLAMA.digest: LLAMA, qwen.digest: qwen}


class NaiveServer(BaseHTTPRequestHandler):
    """Enough of S3 to pass for one: ignores conditions on PUT, answers any GET with the whole object and 200, and cannot
    delete several objects in one request."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    read_only: ClassVar[bool] = False
    verifies: ClassVar[bool] = False
    refused: ClassVar[int] = 0
    """Bodies that their checksum belies."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.read_only:
            self._answer(403)
        elif self.verifies and self.headers["x-amz-checksum-crc32c"]:
            NaiveServer.refused += 1
            self._answer(400, b"<Error><Code>BadDigest</Code></Error>")
        else:
            self.objects[urlsplit(self.path).path] = body
            self._answer(200)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            start = "/bucket/" + query.get("prefix", [""])[0]
            names = sorted(name for name in self.objects if name.startswith(start))
            self._answer(200, "".join(["<ListBucketResult>", *map(self._entry, names), "</ListBucketResult>"]).encode())
        elif parts.path in self.objects:
            self._answer(200, self.objects[parts.path])
        else:
            self._answer(404)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        self.objects.pop(urlsplit(self.path).path, None)
        self._answer(204)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(501)

    def log_message(self, *_: object) -> None: ...

    def _entry(self, name: str) -> str:
        key = escape(name.removeprefix("/bucket/"))
        size = len(self.objects[name])
        return (
            f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2024-01-01T00:00:00Z</LastModified></Contents>"
        )

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class TestNaiveServer:
    @pytest.fixture
    def settings(self) -> Iterator[ObjectSettings]:
        NaiveServer.objects.clear()
        server = ThreadingHTTPServer(("127.0.0.1", 0), NaiveServer)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield ObjectSettings(
                url="s3://bucket",
                endpoint=f"http://127.0.0.1:{server.server_port}",
                access_key_id="a",
                secret_access_key="b",
            )
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    async def test_it_is_seen_through(self, settings: ObjectSettings) -> None:
        async with listed(settings) as tier:
            assert tier.features is not None
            assert dataclasses.astuple(tier.features) == (False, False, False)

    async def test_credentials_that_may_only_read_are_named(
        self, settings: ObjectSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(NaiveServer, "read_only", True)
        with pytest.raises(ConfigError, match=r"object\.access_key_id"):
            await ObjectTier.open(settings)

    async def test_a_checksum_that_is_refused_is_tried_once(
        self, settings: ObjectSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(NaiveServer, "verifies", True)
        monkeypatch.setattr(NaiveServer, "refused", 0)
        async with listed(settings) as tier:
            assert tier.features is not None
            assert tier.features.checksums
        assert NaiveServer.refused == 1, "each other try waits longer, at every start of a node"

    async def test_a_present_block_is_not_written_again(self, settings: ObjectSettings, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as one, listed(settings) as two:
            assert await put(one, block) is PutResult.STORED
            assert await put(two, block) is PutResult.PRESENT
            await assert_holds(two, block)

    async def test_a_race_does_no_harm(self, settings: ObjectSettings, source: random.Random) -> None:
        blocks = [random_block(source, 4096) for _ in range(20)]
        async with listed(settings) as one, listed(settings) as two:
            results = await asyncio.gather(*(put(tier, block) for block in blocks for tier in (one, two)))
            assert set(results) <= {PutResult.STORED, PutResult.PRESENT}
            for block in blocks:
                await assert_holds(one, block)
                await assert_holds(two, block)

    async def test_bad_blocks_are_found_and_heal(self, settings: ObjectSettings, source: random.Random) -> None:
        block = random_block(source, PAYLOAD_BYTES)
        async with listed(settings) as tier:
            await put(tier, block)
            overwrite(settings, block.key, bytes(len(block.envelope)))
            with pytest.raises(BlockCorrupt):
                await tier.get(block.key, aligned_buffer(len(block.envelope)))
            assert await put(tier, block) is PutResult.STORED
            await assert_holds(tier, block)

    async def test_several_blocks_are_deleted(self, settings: ObjectSettings, source: random.Random) -> None:
        chain = random_chain(source, 3, 4096)
        async with listed(settings) as tier:
            for block in chain:
                await put(tier, block)
            assert await tier.delete(block.key for block in chain) == 3
        assert not NaiveServer.objects
