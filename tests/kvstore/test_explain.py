"""From a block's events to the reason why it was missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.explain import Why, at_request, difference, event_document, held, in_words, missing
from kvstore.history import Event, What
from kvstore.identity import Namespace
from kvstore.policy.admission import Reason
from kvstore.tiers.base import Medium

HOST, DISK, OBJECT, REMOTE = Medium
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


def events(*happened: tuple[What, Medium | None] | tuple[What, Medium | None, Reason]) -> list[Event]:
    """One second apart, from second 1 on."""
    return [Event(float(at), *what_where_why) for at, what_where_why in enumerate(happened, start=1)]


SAVED, OUT = (What.SAVED, HOST), (What.EVICTED, HOST)


@pytest.mark.parametrize(
    ("past", "why", "first_cause"),
    [
        ([], Why.NEVER_STORED, None),
        ([SAVED, OUT], Why.EVICTED, (What.EVICTED, HOST)),
        ([SAVED, (What.NOT_ADMITTED, DISK, Reason.UNLIKELY), OUT], Why.NOT_ADMITTED, (What.NOT_ADMITTED, DISK)),
        ([SAVED, (What.QUEUE_FULL, DISK), OUT], Why.NOT_WRITTEN, (What.QUEUE_FULL, DISK)),
        ([SAVED, (What.WRITE_FAILED, OBJECT), OUT], Why.NOT_WRITTEN, (What.WRITE_FAILED, OBJECT)),
        (
            [SAVED, (What.NO_ROOM, DISK), (What.NOT_ADMITTED, OBJECT, Reason.SEEN_ONCE), OUT],
            Why.NOT_ADMITTED,
            (What.NOT_ADMITTED, OBJECT),
        ),
        ([SAVED, (What.WRITTEN, DISK), OUT, (What.EVICTED, DISK)], Why.EVICTED, (What.EVICTED, DISK)),
        ([SAVED, (What.WRITTEN, DISK), (What.EVICTED, DISK), OUT], Why.EVICTED, (What.EVICTED, HOST)),
        (
            [SAVED, (What.NOT_ADMITTED, DISK, Reason.UNLIKELY), (What.WRITTEN, DISK), OUT, (What.EVICTED, DISK)],
            Why.EVICTED,
            (What.EVICTED, DISK),
        ),
        ([SAVED, (What.WRITTEN, DISK), (What.DELETED, DISK), (What.DELETED, HOST)], Why.DELETED, (What.DELETED, HOST)),
        ([SAVED, (What.BURIED, HOST)], Why.DELETED, (What.BURIED, HOST)),
        ([SAVED, (What.WRITTEN, DISK), OUT, (What.CORRUPT, DISK)], Why.LOAD_FAILED, (What.CORRUPT, DISK)),
        ([SAVED, (What.WRITTEN, OBJECT), OUT, (What.GONE, OBJECT)], Why.LOAD_FAILED, (What.GONE, OBJECT)),
        ([(What.NO_ROOM, HOST)], Why.NOT_WRITTEN, (What.NO_ROOM, HOST)),
        ([SAVED], Why.LOST, None),
    ],
)
def test_the_reason_of_a_miss(past: list[object], why: Why, first_cause: tuple[What, Medium] | None) -> None:
    verdict = missing(events(*past))  # type: ignore[arg-type]
    assert verdict.why is why
    assert (verdict.causes[0].what, verdict.causes[0].medium) == first_cause if first_cause else not verdict.causes


def test_all_that_kept_a_block_out_is_named() -> None:
    past = events(SAVED, (What.NOT_ADMITTED, DISK, Reason.UNLIKELY), (What.NOT_ADMITTED, OBJECT, Reason.SEEN_ONCE), OUT)
    detail = missing(past).detail({})
    for expected in ("not admitted to disk", "unlikely", "not admitted to object", "seen_once", "evicted from host"):
        assert expected in detail


def test_a_request_is_judged_by_what_was_known_when_it_asked() -> None:
    past = events(SAVED, OUT, SAVED)
    assert at_request(past, 2.5, was_held=False).why is Why.EVICTED
    assert at_request(past, 0.5, was_held=False).why is Why.NEVER_STORED
    assert at_request(past, 3.5, was_held=True).why is Why.HELD


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (What.DEADLINE, Why.DEADLINE),
        (What.CORRUPT, Why.LOAD_FAILED),
        (What.UNAVAILABLE, Why.LOAD_FAILED),
        (What.GONE, Why.LOAD_FAILED),
        (What.RECOMPUTED, Why.RECOMPUTED),
    ],
)
def test_a_block_that_was_found_and_not_loaded(what: What, why: Why) -> None:
    past = events(SAVED, (what, DISK))
    assert at_request(past, 1.5, was_held=True).why is why
    assert held(past).why is Why.HELD
    assert [cause.what for cause in held(past).causes] == [what]
    assert not held(events(SAVED, (what, DISK), (What.FETCHED, DISK))).causes


def test_a_block_that_there_was_no_room_to_load() -> None:
    assert at_request(events(SAVED, (What.NO_ROOM, HOST)), 1.5, was_held=True).why is Why.LOAD_FAILED
    assert at_request(events(SAVED, (What.NO_ROOM, DISK)), 1.5, was_held=True).why is Why.HELD, "that was a write"


def test_every_event_can_be_said_and_written_down() -> None:
    for what in What:
        event = Event(3600.0, what, DISK, Reason.UNLIKELY, b"\xabcdefgh", (0.2, 0.1))
        assert "01:00:00 UTC" in in_words(event)
        document = event_document(event)
        assert document["tier"] == "disk"
        assert document["text"] == in_words(event)
    assert "200 ms" in in_words(Event(0.0, What.RECOMPUTED, estimates=(0.2, 0.1)))


def test_namespaces_differ_by_field_and_chains_by_adapter_or_salt() -> None:
    other = replace(NAMESPACE, dtype="bfloat16", weights="2")
    assert difference(NAMESPACE, other) == {"dtype": ("float32", "bfloat16"), "weights": ("1", "2")}
    assert difference(NAMESPACE, NAMESPACE, lora="abc") == {"lora": ("", "abc")}
    assert set(difference(NAMESPACE, NAMESPACE, lora="")) == {"cache_salt"}
