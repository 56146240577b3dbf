"""The connector in real vLLM engines on a CPU, with a real node: every token as if nothing had been cached.

float32 throughout: bfloat16 is not reproducible between chunk sizes even without a connector.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from connectors.vllm.process import Answer, EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.cli import app
from kvstore.identity import BlockKey
from kvstore.node.client import Client
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, flip_every_fifth_block, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OUTPUT = 24
ENGINE = {"max_model_len": 2048, "num_gpu_blocks_override": 200}
TIGHT = {**ENGINE, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 82}
"""Several chunks per prompt, and too few pages for what is asked at a time."""
SIZES = ["host.bytes=96MiB", "host.extent_bytes=8MiB", "disk.bytes=256MiB", "disk.segment_bytes=32MiB"]
NODE = [*SIZES, "policy.planner=off", "policy.prefetch=wait_complete"]
"""So small a model may be computed faster than it is loaded, and what is stored is to be loaded here."""

WORDS = [
    "river",
    "stone",
    "lamp",
    "quiet",
    "engine",
    "morning",
    "letter",
    "seven",
    "harbour",
    "yellow",
    "window",
    "garden",
]


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


SYSTEM = prose(0, 700)
PROMPTS = [SYSTEM + prose(seed, 150) for seed in range(1, 5)] + [prose(5, 900), prose(6, 50), SYSTEM]


class Engines:
    """Engines started together, since most of a start is spent importing; each joins when it is first used."""

    def __init__(self, stack: ExitStack, model: Path, node: NodeProcess) -> None:
        log = node.directory / "engines.log"

        def engine(
            arguments: dict[str, Any], socket: Path | None = node.socket, options: dict[str, Any] | None = None
        ) -> EngineProcess:
            return stack.enter_context(cpu_engine(model, log, socket, threads=1, options=options, **arguments))

        self.plain = engine({**ENGINE, "enable_prefix_caching": False}, None)
        self.first = engine(ENGINE, options={"content_fingerprints": True, "preview_tokens": 8})
        self.tight = engine(TIGHT)
        self.bare = engine({**TIGHT, "enable_prefix_caching": False})
        for each in (self.plain, self.first, self.tight, self.bare):
            each.ready()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), PROMPTS)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), *NODE) as node:
        yield node


@pytest.fixture(scope="module")
def engines(model: Path, node: NodeProcess) -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(stack, model, node)


@pytest.fixture(scope="module")
def reference(engines: Engines) -> dict[str, list[int]]:
    """The tokens of each prompt when nothing is cached."""
    tokens = {}
    for prompt in PROMPTS:
        (answer,) = engines.plain.generate([prompt], 2 * OUTPUT)
        tokens[prompt] = answer.tokens
    assert len({tuple(t) for t in tokens.values()}) == len(PROMPTS), "the model must tell the prompts apart"
    return tokens


@pytest.fixture(scope="module")
def saved(engines: Engines, node: NodeProcess, reference: dict[str, list[int]]) -> int:
    """Blocks that the first engine left on the node, after answering every prompt."""
    check([engines.first.generate([prompt], OUTPUT)[0] for prompt in PROMPTS], reference)
    wait_for(lambda: node.blocks()["disk"] == node.blocks()["host"] >= 30)
    return node.blocks()["host"]


def check(answers: list[Answer], reference: dict[str, list[int]], prompts: list[str] = PROMPTS) -> None:
    wrong = [
        i for i, (p, a) in enumerate(zip(prompts, answers, strict=True)) if a.tokens != reference[p][: len(a.tokens)]
    ]
    assert not wrong, f"answers {wrong} are not what computing gives"


def gained(engine: EngineProcess, counter: str, before: float) -> float:
    """How much a counter of ours grew, all labels together. vLLM reports a step's counts with the next step."""
    return kvstore(engine, counter) - before


def way(engine: EngineProcess, name: str) -> float:
    """Loads begun that way."""
    return engine.counters().get(f"vllm:kvstore_loads{{{name}}}", 0)


def kvstore(engine: EngineProcess, counter: str) -> float:
    name = f"vllm:kvstore_{counter}"
    return sum(value for key, value in engine.counters().items() if key.partition("{")[0] == name)


def test_a_fresh_engine_loads_what_another_saved(engines: Engines, saved: int, reference: dict[str, list[int]]) -> None:
    answers = [engines.tight.generate([prompt], OUTPUT)[0] for prompt in PROMPTS]
    check(answers, reference)
    for answer in answers:
        assert answer.cached_tokens >= answer.prompt_tokens // 64 * 64 - 64
    assert way(engines.tight, "in_step") > 0, "nobody else was computed on"
    assert kvstore(engines.tight, "tokens_loaded") > 0.5 * sum(a.prompt_tokens for a in answers[1:5])
    assert engines.tight.counters()["vllm:external_prefix_cache_hits"] == kvstore(engines.tight, "tokens_loaded")


def test_the_node_can_explain_what_an_engine_will_find(
    engines: Engines, node: NodeProcess, model: Path, saved: int, reference: dict[str, list[int]]
) -> None:
    """From text, with the model's tokenizer, and by the id of a request that the engine made."""

    def command(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--socket", str(node.socket), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    for prompt in PROMPTS[:5]:
        document = command("explain", "--text", prompt, "--tokenizer", str(model))
        assert {block["why"] for block in document["blocks"]} == {"held"}, "the keys are those of the engine"
    unknown = command("explain", "--text", PROMPTS[0] + prose(9, 150), "--tokenizer", str(model))
    assert unknown["blocks"][-1]["why"] == "never_stored"
    asked = command("explain", "0-")  # vLLM counts its requests from 0 and adds a random ending
    assert asked["client"] == "vLLM"
    assert {block["where"][-1] for block in asked["blocks"]} == {"disk"}
    assert command("breakers")["prompts"] >= len(PROMPTS)
    texts = [prompt["preview"] for prompt in command("hot", "--tokenizer", str(model))]
    assert any(text and SYSTEM.startswith(text.split(" … ")[0]) for text in texts)


def test_an_engine_without_a_prefix_cache_of_its_own(
    engines: Engines, saved: int, reference: dict[str, list[int]]
) -> None:
    answers = [engines.bare.generate([prompt], OUTPUT)[0] for prompt in PROMPTS]
    check(answers, reference)
    assert kvstore(engines.bare, "tokens_loaded") == sum(a.prompt_tokens // 64 * 64 for a in answers)
    assert way(engines.bare, "in_step") > 0, "nobody else was computed on"
    before = way(engines.bare, "async")
    check(engines.bare.generate(PROMPTS, OUTPUT), reference)
    assert way(engines.bare, "async") > before, "those that came while others were computed on"


@pytest.mark.parametrize("name", ["tight", "bare"])
def test_concurrent_requests_with_preemption(
    engines: Engines, name: str, saved: int, reference: dict[str, list[int]]
) -> None:
    engine: EngineProcess = getattr(engines, name)
    engine.forget()
    before = engine.counters()["vllm:num_preemptions"]
    check(engine.generate(PROMPTS, 2 * OUTPUT), reference)
    assert engine.counters()["vllm:num_preemptions"] > before
    fresh = [SYSTEM + prose(seed, 90) for seed in range(20, 26)]
    expected = {prompt: engines.plain.generate([prompt], OUTPUT)[0].tokens for prompt in fresh}
    for _ in range(2):  # computed and saved in one, loaded in the other
        check(engine.generate(fresh, OUTPUT), expected, fresh)
        engine.forget()


def test_salts_separate_users(engines: Engines, saved: int, reference: dict[str, list[int]]) -> None:
    def loaded_by(salt: str) -> float:
        engines.tight.forget()
        before = kvstore(engines.tight, "tokens_loaded")
        check(engines.tight.generate(PROMPTS[:1], OUTPUT, [salt]), reference, PROMPTS[:1])
        return gained(engines.tight, "tokens_loaded", before)

    assert loaded_by("alice") == 0
    wait_for(lambda: loaded_by("alice") > 0)
    assert loaded_by("bob") == 0


def test_altered_kv_alters_the_answers(
    engines: Engines, node: NodeProcess, saved: int, reference: dict[str, list[int]]
) -> None:
    """The control: were wrong KV loaded, these tests would see it."""
    with node.client() as client:
        assert alter_host_blocks(client)
        engines.tight.forget()
        (answer,) = engines.tight.generate(PROMPTS[4:5], OUTPUT)
        assert answer.tokens != reference[PROMPTS[4]][:OUTPUT]
        engines.tight.forget()
        client.call("delete", keys=b"".join(listed(client)))


def listed(client: Client) -> list[BlockKey]:
    return [BlockKey(bytes(block["key"])) for block in client.call("list", medium="host", limit=100)["blocks"]]


def test_corrupt_blocks_are_computed_and_healed(
    engines: Engines, node: NodeProcess, saved: int, reference: dict[str, list[int]]
) -> None:
    engines.bare.generate(PROMPTS, OUTPUT)
    wait_for(lambda: node.blocks()["disk"] > saved // 2)
    node.stop()
    assert flip_every_fifth_block(node)
    node.start()
    for engine in (engines.tight, engines.bare):
        engine.forget()
        wait_for(lambda: node.clients())
        check([engine.generate([prompt], OUTPUT)[0] for prompt in PROMPTS], reference)
    assert engines.tight.counters()["vllm:kvstore_blocks_missed{corrupt}"] > 0


def test_a_node_that_dies_and_returns(
    engines: Engines, node: NodeProcess, saved: int, reference: dict[str, list[int]]
) -> None:
    for delay in (0.0, 0.03, 0.1):
        engines.tight.forget()
        killer = threading.Timer(delay, node.kill)
        killer.start()
        check(engines.tight.generate(PROMPTS, OUTPUT), reference)
        killer.join()
        check(engines.tight.generate(PROMPTS[:1], OUTPUT), reference, PROMPTS[:1])
        node.start()
        before = kvstore(engines.tight, "tokens_loaded")
        wait_for(lambda before=before: loads_again(engines.tight, before, reference))


def test_a_node_that_hangs(engines: Engines, node: NodeProcess, saved: int, reference: dict[str, list[int]]) -> None:
    engines.tight.forget()
    before = kvstore(engines.tight, "tokens_loaded")
    node.daemon.freeze()
    try:
        check(engines.tight.generate(PROMPTS, OUTPUT), reference)
        assert gained(engines.tight, "tokens_loaded", before) == 0
    finally:
        node.daemon.thaw()
    wait_for(lambda: loads_again(engines.tight, before, reference))


def loads_again(engine: EngineProcess, before: float, reference: dict[str, list[int]]) -> bool:
    engine.forget()
    check(engine.generate(PROMPTS[:2], OUTPUT), reference, PROMPTS[:2])
    return gained(engine, "tokens_loaded", before) > 0
