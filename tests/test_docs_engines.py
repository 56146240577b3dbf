"""The pages about engines: every flag they give is taken by the engine's own parser and ours, snippets do what they show."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectors.lmcache.options import Options as LMCacheOptions
from connectors.sglang.options import Options as SGLangOptions
from connectors.vllm.options import Options as VLLMOptions
from kvstore.identity import NO_PARENT, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.testing.node import NodeProcess, wait_for
from kvstore.testing.servers import free_port
from kvstore.tiers.base import Medium

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / "README.md", ROOT / "examples" / "vllm_lmcache.sh"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "connectors").glob("*/README.md")),
]
ROUTING = (ROOT / "docs" / "routing.md").read_text()


def tables(page: str) -> list[dict[str, str]]:
    """The tables of settings: name to default."""
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(r"\| key \| default \| what it is \|\n\|[-|]+\n((?:\|.*\n)+)", text)
    return [dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)) for table in found]


def flags(option: str) -> list[tuple[str, dict[str, Any]]]:
    """Every JSON object that some page gives to ``option``, with the page's name. Shell variables in it are emptied."""
    found = []
    for page in PAGES:
        for text in re.findall(rf"{option} '(\{{.*?\}})'(?=[\s,.)&]|$)", page.read_text(), re.DOTALL):
            text = re.sub(r"'?\"?\$\{?\w+(?::[^}]*)?\}?\"?'?", "1", text) if page.suffix == ".sh" else text
            if "..." not in text:  # an excerpt, and says so
                found.append((page.name, json.loads(text)))
    return found


@pytest.mark.parametrize(
    ("page", "at", "kind"),
    [("vllm.md", 0, VLLMOptions), ("lmcache.md", 0, LMCacheOptions), ("sglang.md", 0, SGLangOptions)],
)
def test_tables_of_settings_are_complete_and_their_defaults_true(page: str, at: int, kind: type) -> None:
    same_as_documented(tables(page)[at], kind)


def test_the_table_of_the_secondary_tier_is_too() -> None:
    pytest.importorskip("vllm.v1.kv_offload.tiering")
    from connectors.vllm.tier import TierOptions

    same_as_documented(tables("vllm.md")[1], TierOptions)


def same_as_documented(table: dict[str, str], kind: type) -> None:
    defaults = {field.name: field.default for field in fields(kind)}
    assert set(table) == set(defaults)
    for name, text in table.items():
        plain = text.strip("`")
        if re.fullmatch(r'[\d.]+|true|false|".*"', plain):
            said = json.loads(plain)
            assert said == defaults[name] or (name, said, defaults[name]) == ("block_tokens", 64, 0)
        else:
            assert defaults[name] == "", f"{name}: a value in words stands for an empty text"


def test_vllm_takes_every_flag() -> None:
    pytest.importorskip("vllm.v1.kv_offload.tiering")
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    from connectors import settings
    from connectors.vllm.tier import TierOptions

    found = flags("--kv-transfer-config")
    assert {page for page, _ in found} == {"README.md", "vllm.md", "routing.md", "vllm_lmcache.sh"}
    for page, flag in found:
        assert flag["kv_load_failure_policy"] == "recompute", f"{page}: vLLM's default fails a request whose load fails"
        config = KVTransferConfig(**flag)
        if flag["kv_connector"] != "LMCacheMPConnector":
            assert inspect.isclass(KVConnectorFactory.get_connector_class(config)), page
        extra = dict(config.kv_connector_extra_config)
        if flag["kv_connector"] == "KVStoreConnector":
            VLLMOptions.parse(extra)
        for tier in extra.get("secondary_tiers", ()):
            assert SecondaryTierFactory.get_tier_class(tier).__name__ == "KVStoreTier"
            ours = {name: value for name, value in tier.items() if name not in ("type", "module_path")}
            settings.parse(TierOptions, ours, "secondary_tiers")


def test_lmcache_takes_every_flag() -> None:
    pytest.importorskip("lmcache.v1.distributed")
    found = flags("--l2-adapter")
    assert {page for page, _ in found} == {"lmcache.md", "vllm_lmcache.sh"}
    for _, flag in found:
        assert flag["type"] == "plugin"
        assert inspect.isclass(getattr(import_module(flag["module_path"]), flag["class_name"]))
        if "socket" in (params := flag["adapter_params"]):
            params = {name: str(value) for name, value in params.items()}
        LMCacheOptions.parse(params)


def test_sglang_flags_have_known_settings() -> None:
    found = flags("--hicache-storage-backend-extra-config")
    assert len(found) == 2
    for _, flag in found:
        assert (flag["backend_name"], flag["module_path"], flag["class_name"]) == (
            "kvstore", "connectors.sglang", "KVStoreStorage",
        )  # fmt: skip
        SGLangOptions.parse(flag)


def test_metrics_that_the_page_names_exist() -> None:
    pytest.importorskip("vllm")
    from connectors.vllm.metrics import COUNTERS

    page = (ROOT / "docs" / "vllm.md").read_text()
    named = set(re.findall(r"vllm:kvstore_(\w+?)_total", page)) | set(re.findall(r"`\.\.\.?_(\w+?)_total`", page))
    assert named >= {"tokens_loaded", "tokens_saved", "blocks_missed", "blocks_not_saved", "blocks_recomputed"}
    assert named <= set(COUNTERS)


# --- docs/routing.md against live nodes

SPACE = Namespace(
    model="Qwen/Qwen3-8B", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
TOKENS = np.arange(1, 84, dtype="<u4")


@dataclass
class Site:
    """The page's two nodes: one holds five blocks of its prompt, the other three."""

    nodes: list[NodeProcess]
    ports: list[int]
    events: int

    def here(self, snippet: str) -> str:
        """The snippet, with the addresses of these nodes."""
        for shown, port in zip(("7171", "7172"), self.ports, strict=True):
            snippet = snippet.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{port}")
        return snippet.replace("127.0.0.1:5557", f"127.0.0.1:{self.events}")

    def save(self, number: int, blocks: int, start: int = 0) -> None:
        with self.nodes[number].client() as client:
            save(client, blocks, start)


def save(client: Client, blocks: int, start: int = 0) -> None:
    keys = client.open_namespace(SPACE, 10_000).block_keys(chain_digests(TOKENS, SPACE.block_tokens))[:blocks]
    new = [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)][start:]
    client.reserve(SPACE, new)
    assert len(client.commit(keys[start:], durable=Medium.DISK, timeout=60)) == blocks - start


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("zmq")
    pytest.importorskip("fastapi")
    ports, events = [free_port(), free_port()], free_port()
    with contextlib.ExitStack() as stack:
        nodes = []
        for number, port in enumerate(ports):
            settings = [f"api.listen=127.0.0.1:{port}", f"api.peers=http://127.0.0.1:{ports[1 - number]}"]
            settings += ["host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB"]
            settings += [f"events.listen=tcp://127.0.0.1:{events}"] if number == 0 else []
            nodes.append(NodeProcess(tmp_path_factory.mktemp("site"), *settings))
        for node, port in zip(nodes, ports, strict=True):
            stack.enter_context(node)
            wait_for(lambda port=port: listens(port))  # the API comes after the socket
        made = Site(nodes, ports, events)
        made.save(0, 2)
        made.save(1, 3)
        yield made


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ROUTING, re.DOTALL)


def run(site: Site, snippet: str) -> str:
    """What a Python snippet prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(site.here(snippet), "docs/routing.md", "exec"), {})
    return printed.getvalue()


def test_the_page_on_routing_shows_what_it_does(site: Site) -> None:
    ask, follow, derive = snippets("python")
    told: list[str] = []
    both_events = {(kind, tier) for kind in ("BlockStored", "BlockRemoved") for tier in ("host", "disk")}
    follower = [sys.executable, "-u", "-c", site.here(follow)]
    with subprocess.Popen(follower, stdout=subprocess.PIPE, text=True) as process, site.nodes[0].client() as client:
        assert process.stdout is not None
        reader = threading.Thread(target=told.extend, args=(process.stdout,))
        reader.start()

        def heard() -> bool:  # PUB waits for nobody: go on until somebody listens
            client.delete(client.open_namespace(SPACE, 10_000).block_keys(chain_digests(TOKENS, SPACE.block_tokens)))
            save(client, 5)
            return {(line.split()[0], line.split()[-1]) for line in told} >= both_events

        try:
            wait_for(heard)
        finally:
            process.kill()
            reader.join()
    printed = [line.strip() for line in told if line.endswith("\n")]  # the last one may have been cut off by the kill
    form = re.compile(r"missed .*|Block\w+ \[('[0-9a-f]{32}'(, )?)+\] (host|disk)")
    assert [line for line in printed if not form.fullmatch(line)] == []

    (curl,) = [text for text in snippets("console") if "curl" in text]
    command = re.search(r"\$ (curl .*?'\{.*?\}')\n", curl, re.DOTALL)
    assert command is not None
    body = command[1].replace("[1, 2, 3, ... 83]", json.dumps(TOKENS.tolist()))
    answer: dict[str, Any] = {}

    def answered() -> bool:  # a busy machine may need more than the 100 ms that a peer has
        answer.update(json.loads(subprocess.check_output(["bash", "-c", site.here(body)], text=True)))
        return not answer["unanswered"]

    wait_for(answered)
    shown = json.loads(curl[command.end() :])
    assert shape(answer) == shape(shown)
    assert [(n["url"], usable(n)) for n in answer["prompts"][0]["nodes"]] == [
        (site.here(n["url"]), usable(n)) for n in shown["prompts"][0]["nodes"]
    ]

    both = (
        "http://127.0.0.1:7171 [('host', 80), ('disk', 80)]\n"
        "http://127.0.0.1:7172 [('host', 48), ('disk', 48)]\n"
    )  # fmt: skip
    wait_for(lambda: run(site, ask) == site.here(both))

    (peeked,) = run(site, derive).splitlines()
    assert "{'medium': 'disk', 'usable_blocks': 5, 'seconds': 0.0, 'held_blocks': 5}" in peeked


def shape(value: Any) -> Any:
    """Names and types of an answer."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value)


def usable(node: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(tier["medium"], tier["usable_blocks"], tier["usable_tokens"]) for tier in node["tiers"]]
