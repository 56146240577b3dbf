"""The backend in real SGLang engines on a CPU, with a real node: every token as if nothing had been cached.

float32 throughout, so that what is computed and what is loaded are the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from sglang_process import Answer, Engine, backend

from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, flip_every_fifth_block, wait_for
from kvstore.testing.reference import ReferenceModel

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGE = 64
LAYERS, KV_HEADS, HEAD_DIM = 4, 4, 64
"""Of the model that ``make_model`` makes."""
SMALL = ["host.bytes=128MiB", "host.extent_bytes=8MiB", "disk.bytes=256MiB", "disk.segment_bytes=32MiB"]
OBSERVING = "policy.planner=observe"
"""The planner learns, but whatever is stored is loaded: so small a model may be computed faster."""


def prompt(seed: int, pages: int = 6) -> list[int]:
    """Token ids that fill ``pages`` pages and a bit."""
    return random.Random(seed).choices(range(3, 400), k=pages * PAGE + 16)


SYSTEM = prompt(0, 4)[: 4 * PAGE]
PROMPTS = [SYSTEM + prompt(seed, 2) for seed in (1, 2)] + [prompt(3), prompt(4, 12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("model") / "tiny", ["the lamp by the window went out when the winter came"]
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), *SMALL, OBSERVING) as node:
        yield node


class Engines:
    """Engines started together, since most of a start is spent importing."""

    def __init__(self, stack: ExitStack, model: Path, node: NodeProcess) -> None:
        def engine(name: str, arguments: dict[str, Any], allocator: str = "default", **variables: str) -> Engine:
            settings = {**self.settings, "allocator": allocator}
            return stack.enter_context(Engine(model, settings, arguments, node.directory / f"{name}.log", **variables))

        self.settings = {
            "socket": str(node.socket),
            "autostart": False,
            "lookup_timeout_s": 10.0,
            "prefetch_threshold": PAGE,
        }

        # Its pages are blocks: what only the disk has is read straight into them.
        self.first = engine("first", {"hicache_mem_layout": "page_head", "hicache_io_backend": "kernel"}, "shm")
        self.second = engine("second", {"hicache_mem_layout": "layer_first"})
        # Two ranks, in which calls of the backend are late or fail at random, and not together.
        self.pair = engine(
            "pair",
            {"tp_size": 2},
            SGLANG_CPU_OMP_THREADS_BIND="0|1",
            SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE="0.1",
            SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY="0.02",
        )
        for each in (self.first, self.second, self.pair):
            stack.callback(each.hang_up)


@pytest.fixture(scope="module")
def engines(model: Path, node: NodeProcess) -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(stack, model, node)


@pytest.fixture(scope="module")
def reference(engines: Engines, node: NodeProcess) -> list[Answer]:
    """The first engine's answers, computed and saved."""
    answers = [engines.first.generate([each])[0] for each in PROMPTS]
    assert answers[0].cached == 0
    assert len({tuple(answer.tokens) for answer in answers}) == len(PROMPTS), "the model must tell the prompts apart"
    # The fifth and later pages of the second prompt are its own.
    wait_for(lambda: node.blocks()["host"] == 6 + 2 + 6 + 12 and node.blocks()["disk"] == node.blocks()["host"])
    return answers


def ask(engine: Engine, forget: bool = True) -> list[Answer]:
    """Answers to every prompt, by an engine whose own tiers are empty."""
    if forget:
        wait_for(lambda: engine.call("flush"))
    return [engine.generate([each])[0] for each in PROMPTS]


def check(answers: Sequence[Answer], reference: Sequence[Answer]) -> None:
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in reference]
    for answer, wanted in zip(answers, reference, strict=True):
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=2e-3)


def stored(answers: Sequence[Answer]) -> list[int]:
    return [answer.stored for answer in answers]


FULL = [6 * PAGE, 2 * PAGE, 6 * PAGE, 12 * PAGE]
"""Tokens that each prompt has in storage and not yet on the device, when asked in turn."""


def counted(engine: Engine, name: str) -> float:
    return float(engine.call("counters").get(f"sglang:kvstore_{name}", 0))


def served(engine: Engine, reference: list[Answer], forget: bool = True) -> list[Answer]:
    """Right answers to every prompt, wholly from storage; SGLang may give up a first load while it is still warming up."""
    for _ in range(3):
        answers = ask(engine, forget)
        check(answers, reference)
        if stored(answers) == FULL:
            break
        forget = True
    return answers


def test_storage_serves_what_was_flushed(engines: Engines, reference: list[Answer]) -> None:
    assert stored(served(engines.first, reference)) == FULL


def test_the_node_knows_requests_by_their_ids_and_how_fast_they_are_computed(
    engines: Engines, node: NodeProcess, reference: list[Answer]
) -> None:
    with node.client() as client:
        explained = client.call("explain", 30.0, request=reference[3].request)
        assert (explained["client"], explained["chain_blocks"]) == ("SGLang", 12)
        assert sum(block["why"] == "never_stored" for block in explained["blocks"]) == 12

        def steps() -> int:
            found: int = sum(engine["prefill"]["steps"] for engine in client.call("planner")["engines"])
            return found

        wait_for(lambda: steps() >= 4)


def test_a_fresh_engine_with_another_layout_loads_it(engines: Engines, reference: list[Answer]) -> None:
    assert stored(served(engines.second, reference, forget=False)) == FULL
    assert counted(engines.second, "bytes_loaded_total{kv}") >= sum(FULL) * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    assert counted(engines.second, "bytes_saved_total{kv}") == 0


def test_two_ranks_load_what_one_saved_and_the_reverse(engines: Engines, reference: list[Answer]) -> None:
    """Whatever fails on the way changes no token."""
    tries: list[list[int]] = []

    def everything_was_loaded_once() -> bool:
        answers = ask(engines.pair)
        check(answers, reference)
        tries.append(stored(answers))
        return FULL[3] in [tokens[3] for tokens in tries] and FULL[0] in [tokens[0] for tokens in tries]

    wait_for(everything_was_loaded_once)

    fresh = prompt(20)
    (computed,) = engines.pair.generate([fresh])
    assert computed.cached == 0

    def both_ranks_saved_it() -> bool:
        engines.second.call("flush")
        (loaded,) = engines.second.generate([fresh])
        check([loaded], [computed])
        if loaded.stored < 6 * PAGE:
            engines.pair.call("flush")
            check(engines.pair.generate([fresh]), [computed])
        return loaded.stored == 6 * PAGE

    wait_for(both_ranks_saved_it)


def test_detached_and_attached_again_at_run_time(engines: Engines, node: NodeProcess, reference: list[Answer]) -> None:
    engine, clients = engines.second, node.clients()
    wait_for(lambda: engine.call("detach")[0])  # refused while the last step ends
    wait_for(lambda: node.clients() == clients - 1)
    computed = ask(engine)
    check(computed, reference)
    assert stored(computed) == [0] * len(PROMPTS)

    options = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config_json": backend(engines.settings),
    }
    wait_for(lambda: engine.call("attach", options)[0])
    wait_for(lambda: node.clients() == clients)
    assert stored(served(engine, reference)) == FULL


def test_altered_kv_alters_the_answers(engines: Engines, node: NodeProcess, reference: list[Answer]) -> None:
    """The control: were wrong KV loaded, these tests would see it."""
    with node.client() as client:
        assert alter_host_blocks(client) >= 26
    answers = ask(engines.first)
    assert stored(answers) == FULL
    assert all(answer.tokens != wanted.tokens for answer, wanted in zip(answers, reference, strict=True))
    assert engines.first.call("clear")
    assert node.blocks() == {"host": 0, "disk": 0}


def test_corrupt_blocks_are_computed_and_healed(engines: Engines, node: NodeProcess, reference: list[Answer]) -> None:
    check(ask(engines.first), reference)
    wait_for(lambda: node.blocks()["disk"] == 26)
    clients = node.clients()
    node.stop()
    assert flip_every_fifth_block(node) > 2
    node.start()
    wait_for(lambda: node.clients() >= clients)
    answers = ask(engines.first)
    check(answers, reference)
    assert 0 < sum(stored(answers)) < sum(FULL)
    assert counted(engines.first, "pages_missed_total{corrupt}") > 0
    wait_for(lambda: stored(ask(engines.first)) == FULL)


def test_a_node_that_dies_and_returns(engines: Engines, node: NodeProcess, reference: list[Answer]) -> None:
    node.kill()
    check(ask(engines.first), reference)
    check(ask(engines.second), reference)
    assert counted(engines.first, "pages_missed_total{unavailable}") > 0
    node.start()
    straight = 0

    def everything_is_loaded() -> bool:
        nonlocal straight
        answers = ask(engines.first)
        straight = max(straight, sum(stored(answers)) // PAGE - node.blocks()["host"])
        return stored(answers) == FULL

    wait_for(everything_is_loaded)
    if Version(engines.first.call("version")) >= Version("0.5.17"):  # older ones have no pools in shared memory
        assert straight > 0, "blocks that only the disk has come past the node's memory"
    check(ask(engines.first), reference)


def test_sglang_and_transformers_read_each_others_blocks(
    engines: Engines, node: NodeProcess, model: Path, reference: list[Answer]
) -> None:
    other = ReferenceModel(model, node.status())
    with node.client() as client:
        wait_for(lambda: stored(ask(engines.first)) == FULL)
        for tokens, wanted in zip(PROMPTS, reference, strict=True):
            assert other.resume(client, tokens, len(wanted.tokens)) == wanted.tokens

        fresh = prompt(30)
        assert other.save(client, fresh) == 6
        (loaded,) = engines.second.generate([fresh])
        assert loaded.stored == 6 * PAGE
        assert loaded.tokens == other.resume(client, fresh, len(loaded.tokens))

        assert alter_host_blocks(client) >= 26 + 6  # the control: what is read is what counts
        for tokens, wanted in zip(PROMPTS, reference, strict=True):
            assert other.resume(client, tokens, len(wanted.tokens)) != wanted.tokens
