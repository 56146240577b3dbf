"""What the SGLang backend learns of the scheduler that it serves. The hooks themselves run in real engines, in tests/e2e."""

from __future__ import annotations

import logging
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.sglang import hooks
from connectors.sglang.hooks import Observer
from kvstore.policy.prefill import attention

IDLE: Any = SimpleNamespace(waiting_queue=[])


class Seen:
    """A link that keeps what is reported."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []

    def report_step(self, *step: Any) -> None:
        self.steps.append(step)


def prefill(*chunks: tuple[int, int]) -> Any:
    """A batch that computes, for each request, so many tokens (second) behind so many (first)."""
    computed, counts = zip(*chunks, strict=True)
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True), prefix_lens=[*computed], extend_lens=[*counts]
    )


DECODE: Any = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False), prefix_lens=[0], extend_lens=[512])
"""Still holds what it was as a prefill, as SGLang's batches do."""


def observer(*times: float) -> tuple[Observer, Any]:
    clock = iter(times)
    made, seen = Observer(lambda: next(clock)), Seen()
    link: Any = seen
    made.watch(link)
    return made, seen


def test_a_step_is_what_its_requests_compute_and_how_long_it_takes() -> None:
    watching, seen = observer(1.0, 1.5)
    watching.begun(IDLE, prefill((0, 300), (64, 100)))
    watching.ended()
    assert seen.steps == [(400, attention(0, 300) + attention(64, 100), 0.5)]


def test_a_step_launched_while_another_runs_is_timed_from_the_end_of_that() -> None:
    watching, seen = observer(1.0, 1.1, 2.0, 2.25)
    watching.begun(IDLE, DECODE)
    watching.begun(IDLE, prefill((0, 64)))
    watching.ended()
    assert not seen.steps
    watching.ended()
    assert [seconds for _, _, seconds in seen.steps] == [0.25]


def test_steps_too_small_to_tell_anything_are_not_reported() -> None:
    watching, seen = observer(1.0, 2.0)
    watching.begun(IDLE, prefill((512, 4)))
    watching.ended()
    assert not seen.steps


def test_nothing_is_noted_for_nobody() -> None:
    watching, seen = observer(1.0, 2.0, 3.0)
    watching.begun(IDLE, prefill((0, 64)))
    watching.watch(None)
    watching.ended()
    watching.begun(IDLE, prefill((0, 64)))
    watching.ended()
    assert not seen.steps
    assert watching.waiting is None


def test_the_request_that_asks_does_not_wait_for_itself() -> None:
    watching, _ = observer(1.0, 2.0)
    assert watching.waiting is None
    watching.begun(SimpleNamespace(waiting_queue=["asks", "waits"]), DECODE)
    assert watching.waiting == 1
    watching.begun(IDLE, DECODE)
    assert watching.waiting == 0


def test_each_thread_asks_for_its_own_request() -> None:
    watching, _ = observer()
    elsewhere: list[str] = []
    with watching.asking("mine"):
        thread = threading.Thread(target=lambda: elsewhere.append(watching.request))
        thread.start()
        thread.join()
        assert watching.request == "mine"
    assert elsewhere == [""]
    assert watching.request == ""


def test_a_scheduler_that_is_not_understood_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watching, _ = observer(1.0)
    monkeypatch.setattr(hooks, "OBSERVER", watching)
    with caplog.at_level(logging.ERROR, "kvstore"):
        hooks._run_batch(SimpleNamespace(), SimpleNamespace())
        hooks._run_batch(SimpleNamespace(), SimpleNamespace())
    assert len(caplog.records) == 1


def test_the_lookup_goes_through_the_hook_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    watching, _ = observer()
    monkeypatch.setattr(hooks, "OBSERVER", watching)

    def lookup(controller: str, operation: Any) -> tuple[str, str]:
        return controller, watching.request

    assert hooks._storage_hit_query(lookup, "c", SimpleNamespace(request_id="r")) == ("c", "r")
    assert hooks._storage_hit_query(lookup, "c", SimpleNamespace()) == ("c", "")


def test_a_process_without_a_scheduler_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, hooks._SCHEDULER, raising=False)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)  # importing it would fail
    hooks.register()
