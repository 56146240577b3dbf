"""The parts of the object tier that need no server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.envelope import HEADER_BYTES, Header
from kvstore.errors import ConfigError
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.policy.eviction import LRU
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.object.budget import ByteBudget
from kvstore.tiers.object.contents import Contents, plausible_size
from kvstore.tiers.object.names import block_name, namespace_name, parse_block_name, parse_namespace_name
from kvstore.tiers.object.objects import Found

ids = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


class TestNames:
    @given(ids, ids)
    def test_block_names_can_be_read_back(self, namespace: bytes, key: bytes) -> None:
        assert parse_block_name(block_name(namespace, BlockKey(key))) == (namespace, key)

    @given(ids)
    def test_namespace_names_can_be_read_back(self, namespace: bytes) -> None:
        assert parse_namespace_name(namespace_name(namespace)) == namespace

    @given(st.text())
    def test_other_names_are_no_blocks(self, text: str) -> None:
        assert parse_block_name(text) is None
        assert parse_block_name(f"blocks/v1/{text}") is None
        assert parse_namespace_name(text) is None

    def test_a_block_in_the_wrong_folder_is_none(self) -> None:
        name = block_name(bytes(16), BlockKey(bytes(16)))
        assert parse_block_name(name.replace("/00/", "/01/")) is None
        assert parse_block_name(name + "#1") is None


class TestSettings:
    def test_a_bucket_and_its_prefix(self) -> None:
        settings = ObjectSettings(url="s3://a-bucket/some/where/")
        assert (settings.bucket, settings.prefix, settings.folder) == ("a-bucket", "some/where", None)
        assert ObjectSettings(url="s3://a-bucket").prefix == ""

    def test_a_folder(self) -> None:
        settings = ObjectSettings(url="file:///var/lib/with%20space")
        assert (settings.bucket, settings.folder) == ("", Path("/var/lib/with space"))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"url": "s3://"},
            {"url": "http://host/bucket"},
            {"url": "file://relative"},
            {"url": "s3://bucket", "endpoint": "host:9000"},
            {"url": "s3://bucket", "access_key_id": "only"},
            {"url": "s3://bucket", "secret_access_key": "only"},
        ],
    )
    def test_what_cannot_work_is_refused(self, wrong: dict[str, str]) -> None:
        with pytest.raises(ConfigError):
            ObjectSettings(**wrong)

    def test_secrets_are_not_printed(self) -> None:
        settings = ObjectSettings(
            url="s3://bucket", access_key_id="id", secret_access_key="hush", session_token="quiet"
        )
        assert "hush" not in repr(settings)
        assert "quiet" not in repr(settings)

    async def test_a_missing_ca_file_is_named(self, tmp_path: Path) -> None:
        settings = ObjectSettings(
            url="s3://bucket", access_key_id="a", secret_access_key="b", ca_file=tmp_path / "missing.pem"
        )
        with pytest.raises(ConfigError, match=r"missing\.pem"):
            await ObjectTier.open(settings)

    async def test_a_ca_file_with_rubbish_is_refused(self, tmp_path: Path) -> None:
        rubbish = tmp_path / "rubbish.pem"
        rubbish.write_text("-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
        settings = ObjectSettings(url="s3://bucket", access_key_id="a", secret_access_key="b", ca_file=rubbish)
        with pytest.raises(ConfigError):
            await ObjectTier.open(settings)

    async def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"object\.url"):
            await ObjectTier.open(ObjectSettings(url=f"file://{tmp_path}/file/folder"))


class TestByteBudget:
    @given(
        total=st.integers(1, 100),
        requests=st.lists(st.tuples(st.integers(0, 150), st.booleans()), max_size=30),
    )
    def test_the_bound_holds_and_everything_comes_back(self, total: int, requests: list[tuple[int, bool]]) -> None:
        async def scenario() -> None:
            budget = ByteBudget(total)
            held = 0

            async def hold(nbytes: int) -> None:
                nonlocal held
                async with budget.taken(nbytes):
                    held += min(nbytes, total)
                    try:
                        assert held <= budget.used <= total
                        await asyncio.sleep(0)
                    finally:
                        held -= min(nbytes, total)

            tasks = [asyncio.ensure_future(hold(nbytes)) for nbytes, _ in requests]
            await asyncio.sleep(0)
            for task, (_, cancelled) in zip(tasks, requests, strict=True):
                if cancelled:
                    task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
            assert budget.used == 0

        asyncio.run(scenario())

    async def test_large_requests_are_served_in_turn(self) -> None:
        budget = ByteBudget(10)
        order = []

        async def hold(name: str, nbytes: int) -> None:
            async with budget.taken(nbytes):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(hold("first", 6), hold("large", 10), hold("small", 1))
        assert order == ["first", "large", "small"]


def header(number: int, parent: int | None = None, index: int = 0, length: int = 100) -> Header:
    key = BlockKey(number.to_bytes(KEY_BYTES, "big"))
    above = NO_PARENT if parent is None else BlockKey(parent.to_bytes(KEY_BYTES, "big"))
    return Header(key=key, namespace=bytes(16), parent=above, index=index, tokens=64, length=length, crc=0)


class TestContents:
    def test_bytes_follow_what_is_learnt(self) -> None:
        contents = Contents(LRU(), None, 100)
        block = header(1, length=5000)
        contents.note(block.namespace, block.key, Found("name", 12288, None, 7.0))
        assert contents.used_bytes == 12288
        assert not contents.knows_header(block.key)
        contents.index.touch([block.key], 8.0)
        contents.add(block, 3.0)
        assert contents.used_bytes == block.envelope_bytes == 12288
        assert contents.knows_header(block.key)
        stat = contents.index.stat(contents.index.row(block.key) or 0)
        assert (stat.hits, stat.accessed, stat.length) == (1, 8.0, 5000)
        assert contents.forget(block.key) is not None
        assert contents.used_bytes == 0

    def test_victims_are_tails_and_make_enough_room(self) -> None:
        size = header(1).envelope_bytes
        contents = Contents(LRU(), 3 * size, 100)
        for number in range(3):
            contents.add(header(number, number - 1 if number else None, number), 1.0)
        assert contents.victims(size) == [header(2).key]
        assert contents.victims(2 * size) == [header(2).key, header(1).key]

    @given(st.integers(0, 1 << 31))
    def test_plausible_sizes_are_those_of_envelopes(self, length: int) -> None:
        size = header(1, length=length).envelope_bytes
        assert plausible_size(size)
        assert not plausible_size(size - 1)
        assert not plausible_size(HEADER_BYTES - 1)
