"""Planner, mover and pager against a model of vLLM's engine: whatever happens, pages hold what computing would have left.

The model keeps the rules of vLLM's scheduler that matter here: pages, a prefix cache of full pages, chunked prefill,
preemption, asynchronous loads, recomputation behind a page that failed to load.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("vllm")

import connectors.vllm.step_loads as step_loads
import connectors.vllm.worker as worker
from connectors.paging.torch import OpaquePager
from connectors.vllm.keys import Geometry, request_seed
from connectors.vllm.metrics import Recorder
from connectors.vllm.scheduler import Planner
from connectors.vllm.timing import Timing
from kvstore.errors import DeadlineExceeded, KVStoreError, NodeUnavailable
from kvstore.identity import Namespace, chain_digests
from kvstore.testing.inprocess import InProcessNode

PAGE, BLOCK, LAYERS, PAGE_BYTES, POOL = 4, 8, 2, 16, 48
ALPHABET = st.integers(0, 1)
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layers=LAYERS, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=BLOCK, layout="opaque:test",
)  # fmt: skip
GEOMETRY = Geometry(NAMESPACE, PAGE, 1, LAYERS * PAGE_BYTES * BLOCK // PAGE)


class Inline(Executor):
    """Runs at once, so that examples repeat."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Flaky:
    """A client whose next call of a name fails if asked."""

    def __init__(self, node: InProcessNode) -> None:
        self.node = node
        self.failures: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.failures:
            raise self.failures.pop(name)
        return getattr(self.node, name)


class FakeLink:
    def __init__(self, client: Flaky) -> None:
        self.client = client

    @property
    def keyring(self) -> Any:
        return self.client.open_namespace(NAMESPACE, GEOMETRY.block_bytes)

    def on_node(self, callback: Any, gone: Any) -> None:
        self.found = callback

    def lost(self) -> None:
        pass

    def report_answer(self, keys: Any, tokens: int) -> None:
        pass

    def close(self) -> None:
        self.client.close()


@dataclass
class Request:
    """The attributes of vLLM's request that the connector reads."""

    request_id: str
    all_token_ids: list[int]
    cache_salt: str | None = None
    prompt_embeds: None = None
    lora_request: None = None
    mm_features: tuple[()] = ()
    num_preemptions: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    loading: bool = False
    known: bool = False
    """The workers have it: it is not sent as a new request again."""

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return 1


def content(request: Request, page: int, layer: int) -> bytes:
    """The KV of a full page: a function of every token before its end, and of the salt."""
    tokens = request.all_token_ids[: (page + 1) * PAGE]
    return hashlib.blake2b(repr((tokens, request.cache_salt, layer)).encode(), digest_size=PAGE_BYTES).digest()


class Engine:
    """One engine with its connector."""

    def __init__(self, client: Flaky) -> None:
        self.caches = {f"layer{i}": torch.zeros(POOL, PAGE_BYTES, dtype=torch.uint8) for i in range(LAYERS)}
        link: Any = FakeLink(client)
        recorder = Recorder()
        self.client = client
        self.link = link
        self.planner = Planner(link, GEOMETRY, recorder, Timing(link, 1), 5.0)
        self.mover = worker.Mover(link, OpaquePager(self.caches, POOL, 2), GEOMETRY, 0, recorder, 1.0)
        self.free = list(range(1, POOL))
        self.cached: dict[tuple[Any, ...], int] = {}
        self.requests: list[Request] = []
        self.running: list[Request] = []
        self.in_step = 0
        """Loads within a step so far."""

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.planner.add(request)

    def name(self, request: Request, page: int) -> tuple[Any, ...]:
        return (request.cache_salt, *request.all_token_ids[: (page + 1) * PAGE])

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        self.cached = {name: page for name, page in self.cached.items() if page not in taken}
        return taken

    def give_back(self, request: Request) -> None:
        self.free += [page for page in request.pages if page not in self.free]
        others = {page for other in self.requests if other is not request for page in other.pages}
        self.free = [page for page in self.free if page not in others]
        request.pages = []

    def admit(self, request: Request) -> list[Any] | None:
        """Give a waiting request pages; None if there is no room."""
        local = []
        while len(local) < (request.num_tokens - 1) // PAGE and self.name(request, len(local)) in self.cached:
            local.append(self.cached[self.name(request, len(local))])
        calm = "lookup" not in self.client.failures
        external = self.planner.offer(request, len(local) * PAGE)
        assert not calm or external == self.planner.offer(request, len(local) * PAGE), "asking must change nothing"
        assert len(local) * PAGE + external <= request.num_tokens
        need = -(-request.num_tokens // PAGE) - len(local)
        held = [page for page in self.free if page not in local]
        if need > len(held):
            return None
        self.free = held
        request.pages = local + self.take(need)
        request.computed = len(local) * PAGE + external
        request.loading = external > 0 and not self.planner.in_step(request)
        assert request.loading or request.computed < request.num_tokens, "a step computes something"
        self.planner.admit(request, (request.pages,), external)
        return request.pages

    def step(self, chunk: int) -> None:
        new, resumed = [], []
        for request in self.requests:
            if request in self.running or request.loading or (request.pages and request.computed):
                continue
            if not request.pages and self.admit(request) is None:
                break
        scheduled: dict[str, int] = {}
        for request in self.requests:
            if not request.pages or request.loading:
                continue
            if request.computed == request.num_tokens:  # all was loaded: the last token is computed for its logits
                request.computed -= 1
            count = min(chunk, request.num_tokens - request.computed)
            if request not in self.running:
                self.running.append(request)
                (resumed if request.known else new).append(request)
                request.known = True
            scheduled[request.request_id] = count
        old = [request for request in self.running if request not in new]
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, num_computed_tokens=r.computed, block_ids=(r.pages,)) for r in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in old],
                num_computed_tokens=[r.computed for r in old],
                new_block_ids=[(r.pages,) if r in resumed else None for r in old],
                resumed_req_ids={r.request_id for r in resumed},
            ),
            num_scheduled_tokens=scheduled,
        )
        self.execute(self.planner.step(output, None), scheduled)

    def execute(self, plan: Any, scheduled: dict[str, int]) -> None:
        self.mover.protect(plan.overwritten)
        self.mover.begin_saves(plan.saves)
        self.mover.load_in_step([load for load in plan.loads if load.slots])
        later = [load for load in plan.loads if not load.slots]
        for load in later:
            self.mover.load(load).result()
        received, bad = self.mover.take_ended().received, self.mover.take_bad_pages()
        assert received == {load.request_id for load in later}
        self.in_step += len(plan.loads) - len(later)
        for request in self.requests:
            if request.request_id in received:
                self.received(request, bad)
        for request in self.running:
            self.compute(request, scheduled.get(request.request_id, 0))
        self.mover.finish_saves()
        if (told := self.mover.take_told()) is not None:
            self.planner.heard(told)
        assert not any(slot.leases for slot in self.client._slots.values() if not slot.missing), "a lease was left"
        for request in [r for r in self.running if r.computed == r.num_tokens]:
            self.running.remove(request)
            self.requests.remove(request)
            self.planner.finish(request)
            self.give_back(request)

    def received(self, request: Request, bad: set[int]) -> None:
        """vLLM cuts a request off at its first page that failed to load."""
        request.loading = False
        first_bad = next((i for i, page in enumerate(request.pages) if page in bad), None)
        if first_bad is None:
            return
        request.computed = min(request.computed, first_bad * PAGE)
        if request.computed == 0:
            self.give_back(request)

    def compute(self, request: Request, count: int) -> None:
        for page in range(request.computed // PAGE):
            for layer, cache in enumerate(self.caches.values()):
                held = bytes(cache[request.pages[page]].tolist())
                assert held == content(request, page, layer), f"{request.request_id} page {page}"
        stop = request.computed + count
        for page in range(request.computed // PAGE, stop // PAGE):
            for layer, cache in enumerate(self.caches.values()):
                cache[request.pages[page]] = torch.tensor(list(content(request, page, layer)), dtype=torch.uint8)
        request.computed = stop
        for page in range(stop // PAGE):
            self.cached.setdefault(self.name(request, page), request.pages[page])

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        request.num_preemptions += 1
        request.computed = 0
        self.give_back(request)


class EngineMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(worker, "ThreadPoolExecutor", Inline)
        self.patch.setattr(step_loads, "ThreadPoolExecutor", Inline)
        self.patch.setattr(worker, "LOAD_CHUNK", 2)
        self.client = Flaky(InProcessNode(1 << 20))
        self.engines = [Engine(self.client) for _ in range(2)]
        self.count = 0
        self.seen: list[Request] = []

    @rule(
        tokens=st.lists(ALPHABET, min_size=1, max_size=60).map(lambda bits: [0] * 10 + bits),
        salt=st.sampled_from([None, None, "a"]),
    )
    def submit(self, tokens: list[int], salt: str | None) -> None:
        self.count += 1
        request = Request(f"r{self.count}", tokens, salt)
        self.seen.append(request)
        self.engine.add(request)

    @rule(index=st.integers(0, 100), cut=st.integers(0, 40), extra=st.lists(ALPHABET, max_size=20))
    @precondition(lambda self: self.seen)
    def repeat(self, index: int, cut: int, extra: list[int]) -> None:
        """The beginning of a prompt seen before, perhaps with something else behind it."""
        earlier = self.seen[index % len(self.seen)]
        kept = earlier.all_token_ids[: max(len(earlier.all_token_ids) - cut, 1)]
        self.submit((kept + extra)[:120], earlier.cache_salt)

    @rule(chunk=st.integers(1, 40))
    def step(self, chunk: int) -> None:
        self.engine.step(chunk)

    @rule()
    def finish(self) -> None:
        """Let the engine work until it is done, or until what is left does not fit."""
        for _ in range(12):
            self.engine.step(40)

    @rule(index=st.integers(0, 100))
    @precondition(lambda self: self.engine.running)
    def preempt(self, index: int) -> None:
        self.engine.preempt(self.engine.running[index % len(self.engine.running)])

    @rule(index=st.integers(0, 100), token=ALPHABET)
    @precondition(lambda self: self.engine.running)
    def decode(self, index: int, token: int) -> None:
        """A running request samples a token, while there is room for it on its pages."""
        request = self.engine.running[index % len(self.engine.running)]
        if request.num_tokens < len(request.pages) * PAGE:
            request.all_token_ids.append(token)

    @rule()
    def forget(self) -> None:
        self.engine.cached.clear()

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    @rule()
    def other_engine(self) -> None:
        """Go on with the other engine of the machine."""
        self.engines.reverse()

    @rule()
    def restart_engine(self) -> None:
        self.engines[0] = Engine(self.client)

    @rule()
    def restart_node(self) -> None:
        self.client.node = InProcessNode(1 << 20, self.client.node.epoch + 1)

    @rule()
    def find_node(self) -> None:
        """The workers are connected to the node's present run."""
        for engine in self.engines:
            with suppress(KVStoreError):  # as the link does
                engine.link.found()

    @rule(
        name=st.sampled_from(["lookup", "acquire", "reserve", "commit"]),
        kind=st.sampled_from([NodeUnavailable, DeadlineExceeded]),
    )
    def fail(self, name: str, kind: type[Exception]) -> None:
        self.client.failures[name] = kind("injected")

    @invariant()
    def stored_blocks_are_right(self) -> None:
        if not self.seen:
            return
        stored = self.client.node.keys
        keyring = NAMESPACE.keyring(b"testing")
        for request in self.seen:
            digests = chain_digests(request.all_token_ids, BLOCK, request_seed(request) or b"")
            for index, key in enumerate(keyring.block_keys(digests)):
                if key in stored:
                    expected = b"".join(
                        content(request, index * 2 + p, layer) for p in range(2) for layer in range(LAYERS)
                    )
                    assert bytes(self.client.node.payload(key, GEOMETRY.block_bytes)) == expected

    def teardown(self) -> None:
        self.patch.undo()


EngineMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
TestEngineMachine = EngineMachine.TestCase


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(worker, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(step_loads, "ThreadPoolExecutor", Inline)
    return Engine(Flaky(InProcessNode(1 << 20)))


def test_a_second_engine_loads_instead_of_computing(engine: Engine) -> None:
    tokens = list(range(41))
    engine.add(Request("first", tokens))
    engine.step(100)
    client = engine.client
    assert len(client.keys) == 5
    second = Engine(client)
    second.add(request := Request("second", [*tokens]))
    second.step(100)
    assert request.computed == 40, "five blocks loaded, one token left"
    assert second.mover._recorder.take().data["tokens_loaded:host"] == 40


def test_what_could_not_be_saved_is_when_a_request_comes_across_it(engine: Engine) -> None:
    """Also while it lies in the engine's own cache: what is hot there would never be saved."""
    tokens = list(range(41))
    engine.client.failures["reserve"] = DeadlineExceeded("injected")
    engine.add(Request("first", tokens))
    engine.step(100)
    assert not engine.client.keys
    engine.add(Request("second", [*tokens, 7]))
    engine.step(100)
    assert len(engine.client.keys) == 5


def test_an_engine_that_computes_nothing_loads_within_the_step(engine: Engine) -> None:
    tokens = list(range(40))
    engine.add(Request("first", tokens))
    engine.step(100)
    second = Engine(engine.client)
    second.link.found()
    second.step(100)  # the worker tells that it is prepared
    second.add(request := Request("second", [*tokens, 7]))
    second.step(20)
    assert (second.in_step, request.computed) == (1, 41)
    second.add(Request("whole", tokens))
    second.add(slow := Request("slow", [9] * 50))
    second.cached.clear()
    second.step(20)
    assert second.in_step == 2
    assert slow in second.running
    second.add(Request("third", [*tokens, 8]))
    second.cached.clear()
    second.step(20)
    assert second.in_step == 2, "another request is computed on"


def test_a_prefix_hit_inside_a_block_loads_the_rest_of_it(engine: Engine) -> None:
    tokens = list(range(16))
    engine.add(Request("first", [*tokens, 99]))
    engine.step(100)
    second = Engine(engine.client)
    second.add(short := Request("short", tokens[:5]))  # leaves one page in the second engine's own cache
    second.planner.finish(short)
    second.step(100)
    second.add(Request("long", [*tokens, 98]))
    assert second.planner.offer(second.requests[0], PAGE) == 12
    second.step(100)
    assert second.mover._recorder.take().data["tokens_loaded:host"] == 12
    second.step(100)  # checks what was loaded


def test_a_failed_load_is_not_offered_again_until_the_request_is_preempted(engine: Engine) -> None:
    tokens = list(range(41))
    engine.add(Request("first", tokens))
    engine.step(100)
    client = engine.client
    second = Engine(client)
    second.add(request := Request("second", [*tokens]))
    client.failures = {"lookup": NodeUnavailable("injected"), "acquire": NodeUnavailable("injected")}
    second.admit(request)
    assert request.computed == 0, "the lookup failed"
    second.give_back(request)
    second.step(100)
    assert request.computed == 0, "the load failed"
    assert second.planner.offer(request, 0) == 0
    request.num_preemptions += 1
    assert second.planner.offer(request, 0) == 40


def test_requests_that_tokens_do_not_name_are_left_alone(engine: Engine) -> None:
    request: Any = Request("embeds", list(range(41)))
    request.prompt_embeds = torch.zeros(1)
    engine.add(request)
    engine.step(100)
    assert not engine.client.keys
