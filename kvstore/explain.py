"""Why a prompt's blocks are found or missed: pure functions over what is known of each block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from kvstore.history import Event, What
from kvstore.identity import Namespace
from kvstore.tiers.base import Medium


class Why(Enum):
    """What is to be said of a block."""

    HELD = "held"
    NEVER_STORED = "never_stored"
    NOT_ADMITTED = "not_admitted"
    NOT_WRITTEN = "not_written"
    """A tier had no room, its queue was full, or writing failed."""
    EVICTED = "evicted"
    DELETED = "deleted"
    OTHER_NAMESPACE = "other_namespace"
    """The same tokens are stored, for another model, dtype, adapter..."""
    LOAD_FAILED = "load_failed"
    DEADLINE = "deadline"
    RECOMPUTED = "recompute_preferred"
    WITHHELD = "withheld"
    """A tier has it and does not offer it now: it does not answer, or the month's money for reading there is spent."""
    LOST = "lost"
    """It was here, and nothing says what became of it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why, and the events that show it, the most telling first."""

    why: Why
    causes: tuple[Event, ...] = ()

    def detail(self, owners: Mapping[bytes, str]) -> str:
        """The causes in words; ``owners`` as for ``in_words``."""
        return "; ".join(in_words(event, owners) for event in self.causes)


_REFUSALS = {
    What.NOT_ADMITTED: Why.NOT_ADMITTED,
    What.NO_ROOM: Why.NOT_WRITTEN,
    What.QUEUE_FULL: Why.NOT_WRITTEN,
    What.WRITE_FAILED: Why.NOT_WRITTEN,
}
_LOSSES = {
    What.EVICTED: Why.EVICTED,
    What.DELETED: Why.DELETED,
    What.BURIED: Why.DELETED,
    What.GONE: Why.LOAD_FAILED,
    What.CORRUPT: Why.LOAD_FAILED,
}
_LOAD_FAILURES = {
    What.DEADLINE: Why.DEADLINE,
    What.CORRUPT: Why.LOAD_FAILED,
    What.UNAVAILABLE: Why.LOAD_FAILED,
    What.GONE: Why.LOAD_FAILED,
    What.RECOMPUTED: Why.RECOMPUTED,
}


def held(events: Sequence[Event]) -> Verdict:
    """Of a block that is in some tier: whether the last attempt to load it came to something."""
    last = events[-1] if events else None
    return Verdict(Why.HELD, (last,) if last is not None and last.what in _LOAD_FAILURES else ())


def missing(events: Sequence[Event]) -> Verdict:
    """Of a block that no tier holds. ``events`` oldest first.

    Host memory gives everything up in time, so when a slower tier would not take the block, that is the reason; else what ended
    its last copy.
    """
    last_of = {event.medium: event for event in events if event.what not in _NO_CHANGE}
    refused = [last_of[m] for m in Medium if m in last_of and last_of[m].what in _REFUSALS]
    refused.sort(key=lambda event: event.what is not What.NOT_ADMITTED)
    lost = [event for event in reversed(events) if event.what in _LOSSES and last_of.get(event.medium) is event]
    if lost and (lost[0].what is not What.EVICTED or not refused):
        return Verdict(_LOSSES[lost[0].what], (lost[0], *refused))
    if refused:
        return Verdict(_REFUSALS[refused[0].what], (*refused, *lost[:1]))
    return Verdict(Why.LOST if events else Why.NEVER_STORED)


_NO_CHANGE = {What.DEADLINE, What.UNAVAILABLE, What.RECOMPUTED, What.FETCHED}
"""Do not say what their medium holds afterwards."""


def at_request(events: Sequence[Event], asked_at: float, was_held: bool) -> Verdict:
    """Of a block of a request that asked at some time: what its engine met then."""
    if not was_held:
        return missing([event for event in events if event.at <= asked_at])
    later = [event for event in events if event.at >= asked_at]
    for event in later:
        if event.what in _LOAD_FAILURES:
            return Verdict(_LOAD_FAILURES[event.what], (event,))
        if event.what is What.NO_ROOM and event.medium is Medium.HOST:  # nowhere to load it to
            return Verdict(Why.LOAD_FAILED, (event,))
    return Verdict(Why.HELD)


def in_words(event: Event, owners: Mapping[bytes, str] = MappingProxyType({})) -> str:
    """One event as part of a sentence. ``owners``: requests that asked for a block lately, by the first half of its key."""
    when = time.strftime("at %H:%M:%S UTC", time.gmtime(event.at))
    tier = event.medium.value if event.medium else "a tier"
    match event.what:
        case What.EVICTED:
            room = f" to make room for block {event.newcomer.hex()}" if event.newcomer else ""
            room += f" of request {owners[event.newcomer]}" if event.newcomer in owners else ""
            return f"evicted from {tier} {when}{room}"
        case What.NOT_ADMITTED:
            return f"not admitted to {tier} {when}: {event.reason.value if event.reason else 'refused'}"
        case What.RECOMPUTED:
            load, compute = event.estimates or (0.0, 0.0)
            return f"{when} loading was estimated at {load * 1e3:.0f} ms, computing at {compute * 1e3:.0f} ms"
        case _:
            return f"{_PHRASES[event.what].format(tier=tier)} {when}"


_PHRASES = {
    What.SAVED: "saved to host",
    What.FETCHED: "fetched from {tier}",
    What.WRITTEN: "written to {tier}",
    What.NO_ROOM: "{tier} had no room",
    What.QUEUE_FULL: "the write queue of {tier} was full",
    What.WRITE_FAILED: "writing to {tier} failed",
    What.DELETED: "deleted from {tier}",
    What.BURIED: "deleted for good from {tier}, by a tombstone of the region,",
    What.GONE: "{tier} did not have it any more",
    What.CORRUPT: "did not verify when read from {tier}",
    What.UNAVAILABLE: "{tier} did not answer",
    What.DEADLINE: "not loaded before the deadline",
}


def difference(wanted: Namespace, other: Namespace, lora: str | None = None) -> dict[str, tuple[Any, Any]]:
    """Fields in which two namespaces differ, as ``{field: (wanted, other)}``.

    ``lora``: the other chain has a seed of its own, of that adapter; empty for a cache salt.
    """
    fields = wanted.difference(other)
    if lora is not None:
        fields["lora" if lora else "cache_salt"] = (wanted.lora, lora) if lora else ("none", "another")
    return fields


def event_document(event: Event, owners: Mapping[bytes, str] = MappingProxyType({})) -> Mapping[str, Any]:
    """Plain values of an event; ``owners`` as for ``in_words``."""
    return {
        "at": event.at,
        "what": event.what.name.lower(),
        "tier": event.medium.value if event.medium else None,
        "rule": event.reason.value if event.reason else None,
        "newcomer": event.newcomer,
        "estimates": list(event.estimates) if event.estimates else None,
        "text": in_words(event, owners),
    }
