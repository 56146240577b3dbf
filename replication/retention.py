"""Which blocks a region keeps no longer: pure decisions. ``replication.retiring`` carries them out.

Two rules of the topology: blocks that were not used for a while (``ttl``), and blocks of a model's old revision once a newer
one serves (``retire_old_revisions``). Both act region by region, because only a region's own nodes know what is used there.
What was retired does not come back with another region's manifest; a node that uses it again brings it back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from kvstore.catalog.base import Entry
from kvstore.identity import BlockKey, Namespace
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tombstones import Tombstone
from replication.manifest import HotBlock
from replication.topology import Retention

REMEMBERED_SECONDS = 7 * 86_400.0
"""How long it is remembered that a block was retired which no manifest lists: one may be on its way."""
MOST_REMEMBERED = 1_000_000
"""Blocks in each of the two memories: 20 bytes each."""


class Reason(Enum):
    """Why a block is retired."""

    TTL = "ttl"
    REVISION = "old_revision"


@dataclass(slots=True)
class Retired:
    """What was retired, so that it does not come back. Times are seconds since the epoch."""

    blocks: dict[BlockKey, int] = field(default_factory=dict)
    namespaces: dict[bytes, int] = field(default_factory=dict)
    """Of old revisions."""

    def stones(self, blocks: Iterable[HotBlock]) -> list[Tombstone]:
        """The retired ones among ``blocks``, in the form that a plan understands."""
        return [
            Tombstone(time=self.blocks[block.key] + 1.0, prefix=block.key)
            for block in blocks
            if block.key in self.blocks
        ]


@dataclass(slots=True)
class Uses:
    """What is known of uses beyond what blocks say themselves."""

    last: dict[BlockKey, int] = field(default_factory=dict)
    """Of blocks that were used after they had been stored."""
    first_seen: dict[bytes, int] = field(default_factory=dict)
    """When the oldest known block of a namespace was stored."""


@dataclass(frozen=True, slots=True)
class Decision:
    blocks: Sequence[tuple[Entry, Reason]]
    """To delete in this order, tails first."""
    namespaces: Collection[bytes] = ()
    """Old revisions all of whose blocks go."""


def observe(
    blocks: Mapping[BlockKey, Entry], reports: Sequence[HotnessSnapshot], uses: Uses, retired: Retired, now: float
) -> tuple[Uses, Retired]:
    """Learn from what nodes report, and from what is there again although it was retired: somebody used it."""
    last = {key: used for key, used in uses.last.items() if key in blocks}
    for report in reports:
        for key, used in report.used.items():
            if (entry := blocks.get(key)) is not None and used > entry.stored:
                last[key] = max(last.get(key, 0), min(int(used), int(now)))
    first_seen = dict(uses.first_seen)
    newest: dict[bytes, int] = {}
    for key, entry in blocks.items():
        if key in retired.blocks:
            last[key] = int(now)
        first_seen[entry.namespace] = min(first_seen.get(entry.namespace, entry.stored), entry.stored)
        newest[entry.namespace] = max(newest.get(entry.namespace, 0), entry.stored, last.get(key, 0))
    last = dict(sorted(last.items(), key=lambda use: -use[1])[:MOST_REMEMBERED])
    gone = {key: at for key, at in retired.blocks.items() if key not in blocks}
    old = {digest: at for digest, at in retired.namespaces.items() if newest.get(digest, 0) <= at}
    return Uses(last, first_seen), Retired(gone, old)


def decide(
    blocks: Mapping[BlockKey, Entry],
    namespaces: Mapping[bytes, Namespace],
    rules: Sequence[Retention],
    uses: Uses,
    heard: float,
    now: float,
) -> Decision:
    """What to retire. ``heard``: when a node of the region reported last; without reports no revision counts as unused."""
    last = _last_uses(blocks, uses)
    oldest_allowed = {digest: _oldest_allowed(namespace, rules, now) for digest, namespace in namespaces.items()}
    old = _old_revisions(blocks, namespaces, rules, uses, last, heard, now)
    chosen = []
    for key, entry in blocks.items():
        if entry.namespace in old:
            chosen.append((entry, Reason.REVISION))
        elif last[key] < oldest_allowed.get(entry.namespace, 0.0):
            chosen.append((entry, Reason.TTL))
    return Decision(sorted(chosen, key=lambda one: -one[0].depth), old)


def remember(retired: Retired, decision: Decision, listed: Collection[BlockKey], now: float) -> Retired:
    """What was retired, with what is retired now. ``listed``: blocks of the manifests that a plan may be made from."""
    kept = {key: at for key, at in retired.blocks.items() if key in listed or at > now - REMEMBERED_SECONDS}
    kept |= {entry.key: int(now) for entry, _ in decision.blocks}
    latest = dict(sorted(kept.items(), key=lambda one: -one[1])[:MOST_REMEMBERED])
    return Retired(latest, retired.namespaces | dict.fromkeys(decision.namespaces, int(now)))


def _last_uses(blocks: Mapping[BlockKey, Entry], uses: Uses) -> dict[BlockKey, int]:
    """By block, when it or what continues it was stored or used last."""
    last = {key: max(entry.stored, uses.last.get(key, 0)) for key, entry in blocks.items()}
    for entry in sorted(blocks.values(), key=lambda entry: -entry.depth):
        if entry.parent in last:
            last[entry.parent] = max(last[entry.parent], last[entry.key])
    return last


def _oldest_allowed(namespace: Namespace, rules: Sequence[Retention], now: float) -> float:
    """The time before which a last use is too long ago; 0 without a rule. Of several rules the strictest holds."""
    ttls = [rule.ttl for rule in rules if rule.ttl is not None and rule.covers(namespace)]
    return now - min(ttls) if ttls else 0.0


def _old_revisions(
    blocks: Mapping[BlockKey, Entry],
    namespaces: Mapping[bytes, Namespace],
    rules: Sequence[Retention],
    uses: Uses,
    last: Mapping[BlockKey, int],
    heard: float,
    now: float,
) -> set[bytes]:
    """Namespaces of revisions that a newer one has replaced: nothing of them was used or stored within the grace."""
    used: dict[bytes, int] = defaultdict(int)
    for key, entry in blocks.items():
        used[entry.namespace] = max(used[entry.namespace], last[key])
    old: set[bytes] = set()
    for rule in rules:
        if not rule.retire_old_revisions or heard < now - rule.grace:
            continue
        revisions: dict[Namespace, list[bytes]] = defaultdict(list)
        for digest in used.keys() & namespaces.keys():
            if rule.covers(namespaces[digest]):
                revisions[replace(namespaces[digest], weights="any")].append(digest)
        for digests in revisions.values():
            newest = max(digests, key=lambda digest: uses.first_seen[digest])
            if uses.first_seen[newest] > now - rule.grace:
                continue
            old |= {d for d in digests if d != newest and used[d] < now - rule.grace}
    return old
