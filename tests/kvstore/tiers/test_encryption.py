"""Encryption at rest: invisible above, unreadable and unforgeable below."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.encryption import KeyFile, TenantKeys, new_key
from kvstore.envelope import HEADER_BYTES, Header, crc32c
from kvstore.errors import BlockCorrupt, ConfigError, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import NewBlock
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_block
from kvstore.testing.conformance import PAYLOAD_BYTES, TierConformance, assert_holds, put
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium, PutResult, Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.encryption import Encrypting
from kvstore.tiers.object import ObjectSettings, ObjectTier

KEY = new_key()


class TestConformance(TierConformance):
    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        self.directory = directory
        disk = await DiskTier.open(directory / "disk", capacity_bytes, segment_bytes=4 << 20)
        return Encrypting(disk, TenantKeys(KEY, "a"))

    async def reopen(self, tier: Tier) -> Tier | None:
        await tier.close()
        return await self.open(self.directory, 16 << 20)


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[ObjectTier]:
    tier = await ObjectTier.open(ObjectSettings(url=f"file://{tmp_path}/store"))
    await tier.ready.wait()
    yield tier
    await tier.close()


@pytest.fixture
def block() -> SealedBlock:
    return random_block(random.Random(5), PAYLOAD_BYTES)


async def got(tier: Tier, block: SealedBlock) -> tuple[Header, memoryview]:
    buffer = aligned_buffer(block.header.envelope_bytes)
    return await tier.get(block.key, buffer), buffer


async def test_below_there_is_only_ciphertext(folder: ObjectTier, block: SealedBlock) -> None:
    tier = Encrypting(folder, TenantKeys(KEY, "a"))
    await put(tier, block)
    header, stored = await got(folder, block)
    assert header.codecs
    assert header.length == block.header.length
    assert block.payload[:64] not in bytes(stored)
    assert (header.parent, header.index, header.tokens) == (
        block.header.parent,
        block.header.index,
        block.header.tokens,
    )
    await assert_holds(tier, block)


async def test_the_same_block_is_never_encrypted_twice_in_the_same_way(folder: ObjectTier, block: SealedBlock) -> None:
    tier = Encrypting(folder, TenantKeys(KEY, "a"))
    stored = []
    for _ in range(2):
        await put(tier, block)
        stored.append(bytes((await got(folder, block))[1]))
        await tier.delete([block.key])
    assert stored[0] != stored[1]


@pytest.mark.parametrize("change", ["payload", "parent", "index", "tokens", "namespace", "nonce", "plaintext"])
async def test_what_was_changed_is_dropped_even_with_its_checksums_made_good(
    folder: ObjectTier, block: SealedBlock, change: str
) -> None:
    tier = Encrypting(folder, TenantKeys(KEY, "a"))
    await put(tier, block)
    header, stored = await got(folder, block)
    match change:
        case "payload":
            stored[HEADER_BYTES] ^= 1
        case "parent":
            header = replace(header, parent=block.key)
        case "index" | "tokens":
            header = replace(header, **{change: 7})
        case "namespace":
            header = replace(header, namespace=b"another namesp..")
        case "nonce":
            header = replace(header, cipher=header.cipher[:8] + bytes([header.cipher[8] ^ 1]) + header.cipher[9:])
        case "plaintext":
            header, stored = replace(block.header), block.envelope
    header = replace(header, crc=crc32c(stored[HEADER_BYTES : HEADER_BYTES + header.length]))
    header.pack_into(stored)
    await folder.delete([block.key])
    assert await folder.put(header, stored) is PutResult.STORED
    with pytest.raises(BlockCorrupt):
        await got(tier, block)
    assert block.key not in tier.keys()
    await put(tier, block)
    await assert_holds(tier, block)


async def test_another_tenants_key_opens_nothing(folder: ObjectTier, block: SealedBlock) -> None:
    await put(Encrypting(folder, TenantKeys(KEY, "a")), block)
    with pytest.raises(BlockCorrupt):
        await got(Encrypting(folder, TenantKeys(KEY, "b")), block)


async def test_an_unknown_key_leaves_the_block_where_it_is(folder: ObjectTier, block: SealedBlock) -> None:
    tier = Encrypting(folder, TenantKeys(KEY, "a"))
    await put(tier, block)
    with pytest.raises(TierUnavailable, match=KEY[:16]):
        await got(Encrypting(folder, TenantKeys(new_key(), "a")), block)
    await assert_holds(tier, block)


async def test_keys_rotate_without_a_restart(folder: ObjectTier, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, second = new_key(), new_key()

    def write(*lines: str) -> None:
        scratch = tmp_path / "scratch"
        scratch.write_text("\n".join(lines))
        scratch.chmod(0o600)
        scratch.replace(file)

    write(first)
    tier = Encrypting(folder, KeyFile(file, "a"))
    old, new = (random_block(random.Random(seed), PAYLOAD_BYTES) for seed in range(2))
    await put(tier, old)
    write(second, first)
    await put(tier, new)
    assert (await got(folder, new))[0].cipher.hex().startswith(second[:16])
    await assert_holds(tier, old)
    await assert_holds(tier, new)
    write("nonsense")
    await assert_holds(tier, old)


@pytest.mark.parametrize("text", ["", "short", f"{KEY[:-2]}", f"{KEY} {KEY}", "g" * 16 + KEY[16:]])
def test_bad_keys_are_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TenantKeys(text, "a")
    assert KEY[17:40] not in str(refused.value)


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyFile(file, "a")


def test_a_node_without_the_keys_misses_and_one_with_them_hits(tmp_path: Path) -> None:
    namespace = Namespace(
        model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
        block_tokens=16, layout="opaque:test",
    )  # fmt: skip
    keys = [BlockKey(bytes([number]) * 16) for number in range(1, 6)]

    def loaded(*settings: str) -> tuple[int, str]:
        with RunningNode(tmp_path, *settings) as node, PatientClient(node.socket) as client:
            client.open_namespace(namespace, 10_000)
            acquired = client.acquire(keys, 50)
            payloads = [bytes(acquired.arena.slot(offset, 1)) for offset in acquired.offsets]
            assert payloads == [bytes([index]) for index in range(len(payloads))]
            return len(payloads), acquired.miss.value if acquired.miss else ""

    with RunningNode(tmp_path, f"encryption.keys={KEY}") as node, PatientClient(node.socket) as client:
        client.open_namespace(namespace, 10_000)
        reserved = client.reserve(namespace, [NewBlock(key, NO_PARENT, 0) for key in keys])
        for index, offset in enumerate(reserved.offsets):
            assert offset is not None
            reserved.arena.slot(offset, 10_000)[:] = bytes([index]) * 10_000
        assert len(client.commit(keys, durable=Medium.DISK)) == 5
    assert loaded() == (0, "unavailable")
    assert loaded(f"encryption.keys={new_key()}") == (0, "unavailable")
    assert loaded(f"encryption.keys={new_key()} {KEY}") == (5, "")


def test_a_node_serves_on_while_its_keys_rotate(tmp_path: Path) -> None:
    """Blocks of before and after are loaded from disk all the time; at the end under the new key alone what is old misses."""
    namespace = Namespace(
        model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
        block_tokens=16, layout="opaque:test",
    )  # fmt: skip
    file, (first, second) = tmp_path / "keys", (new_key(), new_key())
    keys = [BlockKey(bytes([number]) * 16) for number in range(1, 7)]

    def write(*lines: str) -> None:
        scratch = tmp_path / "scratch"
        scratch.write_text("\n".join(lines))
        scratch.chmod(0o600)
        scratch.replace(file)

    def save(client: PatientClient, wanted: list[BlockKey]) -> None:
        reserved = client.reserve(namespace, [NewBlock(key, NO_PARENT, 0) for key in wanted])
        for key, offset in zip(wanted, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.slot(offset, 10_000)[:] = key[:1] * 10_000
        assert client.commit(wanted, durable=Medium.DISK) == tuple(wanted)
        client.call("evict", medium="host", keys=b"".join(wanted))

    def load(client: PatientClient, wanted: list[BlockKey]) -> list[BlockKey]:
        acquired = client.acquire(wanted, 50)
        found = wanted[: len(acquired.offsets)]
        for key, offset in zip(found, acquired.offsets, strict=True):
            assert bytes(acquired.arena.slot(offset, 10_000)) == key[:1] * 10_000
        client.release(found)
        client.call("evict", medium="host", keys=b"".join(found))
        return found

    write(first)
    with RunningNode(tmp_path, f"encryption.key_file={file}") as node, PatientClient(node.socket) as client:
        client.open_namespace(namespace, 10_000)
        save(client, keys[:3])
        write(second, first)
        assert load(client, keys[:3]) == keys[:3]
        save(client, keys[3:])
        assert load(client, keys) == keys
    write(second)
    with RunningNode(tmp_path, f"encryption.key_file={file}") as node, PatientClient(node.socket) as client:
        client.open_namespace(namespace, 10_000)
        assert load(client, keys[3:]) == keys[3:]
        assert load(client, keys[:3]) == []
