"""Two regions end to end: a node saves, its region publishes, the other region pulls, its node is warm before any engine runs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from region_cases import KEY, LLAMA
from region_pair import Pair
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.envelope import envelope_bytes
from kvstore.identity import NO_PARENT, BlockKey, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication.contents import Contents
from replication.links import Links
from replication.publisher import publish

pytestmark = pytest.mark.s3

BLOCK_BYTES = 50_000
SIZE = envelope_bytes(BLOCK_BYTES)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        yield Path(name)


def node_on(bucket: ObjectSettings, folder: Path, *overrides: str) -> RunningNode:
    folder.mkdir(exist_ok=True)
    return RunningNode(folder, *object_settings(bucket), *overrides)


def object_settings(bucket: ObjectSettings) -> list[str]:
    return [
        f"object.url={bucket.url}",
        f"object.endpoint={bucket.endpoint}",
        f"object.access_key_id={bucket.access_key_id}",
        f"object.secret_access_key={bucket.secret_access_key}",
    ]


def prompt(number: int, blocks: int) -> list[int]:
    return [number * 10_000 + token for token in range(blocks * LLAMA.block_tokens)]


def payload(key: BlockKey) -> bytes:
    return (key * (BLOCK_BYTES // len(key) + 1))[:BLOCK_BYTES]


def keys_of(client: PatientClient, tokens: list[int]) -> list[BlockKey]:
    keyring = client.open_namespace(LLAMA, BLOCK_BYTES)
    return keyring.block_keys(chain_digests(tokens, LLAMA.block_tokens))


def save(client: PatientClient, tokens: list[int]) -> list[BlockKey]:
    """As an engine would, until the blocks are in the bucket."""
    keys = keys_of(client, tokens)
    parents = [NO_PARENT, *keys]
    reserved = client.reserve(LLAMA, [NewBlock(key, parents[i], i) for i, key in enumerate(keys)])
    wanted = [(key, offset) for key, offset in zip(keys, reserved.offsets, strict=True) if offset is not None]
    for key, offset in wanted:
        reserved.arena.slot(offset, BLOCK_BYTES)[:] = payload(key)
    new = [key for key, _ in wanted]
    assert set(client.commit(new, durable=Medium.OBJECT)) == set(new)
    return keys


def loaded(client: PatientClient, keys: list[BlockKey]) -> list[tuple[Medium, bytes]]:
    acquired = client.acquire(keys, 10.0)
    found = [
        (medium, bytes(acquired.arena.slot(offset, BLOCK_BYTES)))
        for medium, offset in zip(acquired.media, acquired.offsets, strict=True)
    ]
    client.release(keys[: len(found)])
    return found


def arguments(node: RunningNode, bucket: ObjectSettings, *more: str) -> list[str]:
    options = [text for setting in object_settings(bucket) for text in ("--set", setting)]
    place = f"node.directory={node.config.node.directory}"
    return ["warm", "--socket", str(node.socket), "--set", place, *options, "--json", *more]


def warm(node: RunningNode, bucket: ObjectSettings, *more: str, status: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, arguments(node, bucket, *more))
    assert result.exit_code == status, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def check(node: RunningNode, *more: str, status: int = 0) -> dict[str, Any] | None:
    """What a readiness gate asks."""
    place = f"node.directory={node.config.node.directory}"
    result = CliRunner().invoke(app, ["warm", "--check", "--set", place, "--json", *more])
    assert result.exit_code == status, result.output
    document: dict[str, Any] | None = json.loads(result.stdout)
    return document


def test_a_new_region_is_warm_before_its_first_engine(pair: Pair, folder: Path) -> None:
    with node_on(pair.na, folder / "a") as a, PatientClient(a.socket) as engine:
        chains = [save(engine, prompt(number, 6)) for number in range(4)]
    asyncio.run(pair.publish())
    cycle = asyncio.run(pair.cycle(pair.write()))
    assert cycle.problems == {}
    with node_on(pair.eu, folder / "b") as b:
        assert check(b, status=1) is None
        report = warm(b, pair.eu)
        assert report["blocks"] == {"object": 24}
        warmth = check(b, "--at-least", "1.0")
        assert warmth is not None
        assert (warmth["state"], warmth["warm_blocks"], warmth["share"]) == ("done", 24, 1.0)
        assert report["bytes_from_bucket"] == 24 * SIZE
        assert report["ready"] == 1.0
        assert report["prefill_seconds_saved"] == pytest.approx(24 * LLAMA.block_tokens / 20_000)
        with PatientClient(b.socket) as engine:
            for number, keys in enumerate(chains):
                assert keys_of(engine, prompt(number, 6)) == keys
                delivered = loaded(engine, keys)
                assert {medium for medium, _ in delivered} <= {Medium.HOST, Medium.DISK}
                assert [body for _, body in delivered] == [payload(key) for key in keys]
            status = engine.call("status")
            disk = next(tier for tier in status["tiers"] if tier["medium"] == "disk")
            assert disk["blocks"] == 24, "a restart finds them as well"
        again = warm(b, pair.eu)
        assert again["blocks"].keys() <= {"host", "disk"}
        assert again["bytes_from_bucket"] == 0


def published(bucket: ObjectSettings, folder: Path, prompts: int, blocks: int = 4) -> list[list[BlockKey]]:
    """A bucket with chains in it, and its manifest."""
    with node_on(bucket, folder / "writer") as writer, PatientClient(writer.socket) as engine:
        chains = [save(engine, prompt(number, blocks)) for number in range(prompts)]

    async def tell() -> None:
        async with Links.open([bucket]) as links:
            await publish(Contents(links), "na", KEY)

    asyncio.run(tell())
    return chains


def test_the_budget_is_kept_and_chains_are_whole(na: ObjectSettings, folder: Path) -> None:
    chains = published(na, folder, prompts=3)
    with node_on(na, folder / "b") as node:
        report = warm(node, na, "--budget", str(5 * SIZE))
        assert report["planned"]["bytes"] == 5 * SIZE
        assert sum(report["skipped"].values()) == 7
        with PatientClient(node.socket) as client:
            media = [[client.call("inspect", key=key)["media"][0] for key in keys] for keys in chains]
    lengths = [next((i for i, medium in enumerate(chain) if medium == "object"), len(chain)) for chain in media]
    assert sum(lengths) == 5, "prefixes, no holes"


def test_more_than_host_memory_holds_is_on_disk_and_the_hottest_in_memory(na: ObjectSettings, folder: Path) -> None:
    chains = published(na, folder, prompts=30)
    with node_on(na, folder / "b", "host.bytes=2MiB", "host.extent_bytes=256KiB") as node:
        report = warm(node, na)
        assert report["ready"] == 1.0
        with PatientClient(node.socket) as client:
            tiers = {tier["medium"]: tier for tier in client.call("status")["tiers"]}
            assert tiers["disk"]["blocks"] == 120
            for keys in chains:
                assert [body for _, body in loaded(client, keys)] == [payload(key) for key in keys]


def test_prompts_of_a_file(na: ObjectSettings, folder: Path) -> None:
    chains = published(na, folder, prompts=3)
    file = folder / "prompts.jsonl"
    file.write_text(f"{json.dumps(prompt(1, 4))}\n\n{json.dumps(prompt(9, 2))}\n")
    with node_on(na, folder / "b") as node:
        report = warm(node, na, "--prompts", str(file), "--namespace", "llama")
        assert report["planned"]["blocks"] == 4
        assert report["skipped"] == {"not_in_bucket": 2}
        with PatientClient(node.socket) as client:
            assert {medium for medium, _ in loaded(client, chains[1])} <= {Medium.HOST, Medium.DISK}
        for bad in ("[1, -2]", "{}", "not json"):
            file.write_text(bad)
            result = CliRunner().invoke(app, arguments(node, na, "--prompts", str(file), "--namespace", "llama"))
            assert result.exit_code == 2
            assert "prompts.jsonl:1" in result.output
        assert CliRunner().invoke(app, arguments(node, na, "--prompts", str(file))).exit_code == 2
        wrong = CliRunner().invoke(app, arguments(node, na, "--prompts", str(file), "--namespace", "qwen"))
        assert "(llama)" in wrong.output


def test_texts_of_a_file_are_read_with_the_engines_tokenizer(na: ObjectSettings, folder: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{token}": token for token in prompt(0, 4)}, "w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "model")
    (chain,) = published(na, folder, prompts=1)
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps(" ".join(f"w{token}" for token in prompt(0, 3))))
    given = ("--prompts", str(file), "--namespace", "llama")
    with node_on(na, folder / "b") as node:
        refused = CliRunner().invoke(app, arguments(node, na, *given))
        assert refused.exit_code == 2
        assert "needs --tokenizer" in " ".join(refused.output.split())
        report = warm(node, na, *given, "--tokenizer", str(folder / "model"))
        assert (report["planned"]["blocks"], report["skipped"]) == (3, {})
        with PatientClient(node.socket) as client:
            keys_of(client, prompt(0, 4))
            assert [medium is Medium.OBJECT for medium, _ in loaded(client, chain)] == [False, False, False, True]
        for wrong in ((*given, "--tokenizer", str(folder / "nothing")), ("--tokenizer", str(folder / "model"))):
            assert CliRunner().invoke(app, arguments(node, na, *wrong)).exit_code == 2


def test_without_a_manifest_the_latest_blocks_are_hot(na: ObjectSettings, folder: Path) -> None:
    with node_on(na, folder / "writer") as writer, PatientClient(writer.socket) as engine:
        save(engine, prompt(0, 3))
    with node_on(na, folder / "b") as node:
        assert warm(node, na)["blocks"] == {"object": 3}


def test_another_tenants_blocks_are_not_for_this_node(na: ObjectSettings, folder: Path) -> None:
    published(na, folder, prompts=1)
    with node_on(na, folder / "b", "identity.tenant=other") as node:
        report = warm(node, na, "--set", "identity.tenant=other")
        assert report["skipped"] == {"other_tenant": 4}
        assert report["planned"]["blocks"] == 0


def test_a_damaged_block_is_skipped_with_what_continues_it(na: ObjectSettings, folder: Path) -> None:
    chains = published(na, folder, prompts=2)
    bucket = Objects.connect(na).store
    name = block_name(LLAMA.digest, chains[0][1])
    body = bytearray(obstore.get(bucket, name).bytes().to_bytes())
    body[-5000] ^= 1
    obstore.put(bucket, name, bytes(body))
    with node_on(na, folder / "b") as node:
        report = warm(node, na, status=1)
        assert report["skipped"] == {"corrupt": 1, "parent": 2}
        warmth = check(node, "--at-least", "0.6")
        assert warmth is not None
        assert (warmth["state"], warmth["skipped"]) == ("done", report["skipped"])
        assert report["ready"] == pytest.approx(5 / 8)
        again = warm(node, na)
        assert again["planned"]["blocks"] == 5, "by now the bucket has it in quarantine"


def test_a_node_that_started_earlier_learns_of_new_blocks(na: ObjectSettings, folder: Path) -> None:
    with node_on(na, folder / "b") as node:
        with PatientClient(node.socket) as client:
            client.call("status")
        chains = published(na, folder, prompts=5, blocks=8)
        assert warm(node, na)["ready"] == 1.0
        with PatientClient(node.socket) as client:
            assert len(loaded(client, chains[0])) == 8


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_state_from_which_the_next_run_goes_on(
    na: ObjectSettings, folder: Path, signum: signal.Signals
) -> None:
    chains = published(na, folder, prompts=20)
    with node_on(na, folder / "b") as node:
        argv = [sys.executable, "-m", "kvstore", *arguments(node, na, "--rate", "1MiB")]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with PatientClient(node.socket) as client:
            while sum(tier["blocks"] for tier in client.call("status")["tiers"] if tier["medium"] == "host") < 20:
                assert process.poll() is None
                time.sleep(0.05)
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        report = json.loads(out)
        assert report["interrupted"]
        assert 0 < report["ready"] < 1
        warmth = check(node, "--at-least", "0.01")
        assert warmth is not None
        assert warmth["state"] == "cancelled"
        assert check(node, "--at-least", "1.0", status=1) == warmth
        rest = warm(node, na)
        assert rest["ready"] == 1.0
        assert rest["bytes_from_bucket"] < 80 * SIZE
        with PatientClient(node.socket) as client:
            assert all(len(loaded(client, keys)) == 4 for keys in chains)


def test_a_warm_up_that_breaks_off_says_why(na: ObjectSettings, folder: Path) -> None:
    with node_on(na, folder / "b") as node:
        gone = [text.replace(na.endpoint, "http://127.0.0.1:9") for text in arguments(node, na)]
        assert CliRunner().invoke(app, gone).exit_code == 1
        warmth = check(node, status=1)
        assert warmth is not None
        assert warmth["state"] == "failed"
        assert warmth["problem"]


def test_memory_is_cold_after_a_restart_and_says_so(na: ObjectSettings, folder: Path) -> None:
    published(na, folder, prompts=1)
    with node_on(na, folder / "b", "disk.enabled=false") as node:
        warm(node, na, "--set", "disk.enabled=false")
        assert check(node) is not None
    with node_on(na, folder / "b", "disk.enabled=false") as node:
        assert check(node, status=1) is None


def test_without_a_node_the_exit_status_is_3(na: ObjectSettings, folder: Path) -> None:
    options = ["--socket", str(folder / "none.sock"), "--set", f"object.url={na.url}"]
    assert CliRunner().invoke(app, ["warm", *options]).exit_code == 3
