"""Warms a node: brings the bucket's hot blocks to host memory and disk before any engine asks for them.

Everything goes through the node's own client, block by block in batches: what a node promotes it also writes down to its disk.
A warm-up that is broken off leaves whole blocks and whole prefixes; the next one goes on behind them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.envelope import envelope_bytes
from kvstore.errors import ConfigError, IdentityError
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import Miss
from kvstore.node.client import Client
from kvstore.node.protocol import join_keys
from kvstore.tiers.base import Medium
from replication.hotset import HotSet, label_of
from replication.manifest import HotBlock
from replication.planner import LeftOut, Limits, Plan, plan
from replication.rate import RateLimit

BATCH_BLOCKS = 32
"""What a node fetches at a time."""
HOST_SHARE, DISK_SHARE = 0.8, 0.9
"""Of a tier's capacity that a warm-up fills, unless told otherwise: traffic needs some room as well."""
ACQUIRE_SECONDS = 60.0
DRAIN_SECONDS = 60.0
FIND_SECONDS = 30.0
PASSING = (Miss.UNAVAILABLE, Miss.NO_ROOM, Miss.DEADLINE)
"""What a bucket that hiccups, or a node that is busy, answers: worth ``TRIES``."""
TRIES = 5
RETRY_SECONDS = 1.0


@dataclass
class WarmReport:
    """What a warm-up did."""

    planned_blocks: int = 0
    planned_bytes: int = 0
    blocks: Counter[str] = field(default_factory=Counter)
    """By where they were found: ``object``, or ``host`` and ``disk`` for those that were warm already."""
    nbytes: int = 0
    """Fetched from the bucket."""
    warm_bytes: int = 0
    """Of the planned bytes, those on the node now."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Blocks by the reason why they are not."""
    tokens: int = 0
    """That the warm blocks stand for."""
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def ready(self) -> float:
        """Share of the plan that is warm, by bytes; 1 when there was nothing to do."""
        return self.warm_bytes / self.planned_bytes if self.planned_bytes else 1.0


Progress = Callable[[WarmReport], None]


class Warmer:
    """Fills one node. Blocking; one thread."""

    def __init__(
        self,
        client: Client,
        tenant: str,
        rate: RateLimit,
        progress: Progress = lambda report: None,
        report: WarmReport | None = None,
    ) -> None:
        """``tenant``: whose blocks the node serves. ``progress`` is told of ``report`` as it grows."""
        self.report = report if report is not None else WarmReport()
        self._client = client
        self._tenant = tenant
        self._rate = rate
        self._progress = progress
        self._warmed: set[BlockKey] = set()
        tiers = {tier["medium"]: tier for tier in client.call("status")["tiers"]}
        self._host_bytes = int(tiers["host"]["capacity_bytes"])
        disk = tiers.get("disk")
        self.default_budget = int(disk["capacity_bytes"] * DISK_SHARE if disk else self._host_bytes * HOST_SHARE)

    def run(self, hot: HotSet, namespaces: Mapping[bytes, Namespace], budget: int | None = None) -> WarmReport:
        """Warm what is hottest per byte, prefixes first, within ``budget`` bytes. Raises NodeUnavailable.

        Ctrl-C ends it; the report says so.
        """
        started = time.monotonic()
        try:
            chosen = self._choose(hot, namespaces, self.default_budget if budget is None else budget)
            tokens = {digest: label.block_tokens for digest, label in hot.labels.items()}
            self._fetch(chosen.blocks, tokens)
            self._bring_hottest_to_host(chosen.blocks)
            self._client.call("drain", DRAIN_SECONDS + 5, timeout=DRAIN_SECONDS)
            self._take_back(chosen.blocks, tokens)
        except KeyboardInterrupt:
            self.report.interrupted = True
        self.report.seconds = time.monotonic() - started
        return self.report

    def _choose(self, hot: HotSet, namespaces: Mapping[bytes, Namespace], budget: int) -> Plan:
        lengths = {block.namespace: block.length for block in hot.blocks}
        refused: dict[bytes, LeftOut] = {}
        for digest, length in lengths.items():
            problem = self._open(namespaces.get(digest), length)
            if problem is not None:
                refused[digest] = LeftOut.OTHER_FLOW
                self.report.skipped[problem] += sum(block.namespace == digest for block in hot.blocks)
        chosen = plan(
            hot.blocks, hot.labels, set(), Limits(held_bytes=budget), wanted=lambda label: refused.get(label.digest)
        )
        for reason, tally in chosen.left_out.items():
            if reason is not LeftOut.OTHER_FLOW:
                self.report.skipped[reason.value] += tally.blocks
        self.report.planned_blocks = len(chosen.blocks)
        self.report.planned_bytes = chosen.nbytes
        self._progress(self.report)
        return chosen

    def _open(self, namespace: Namespace | None, length: int) -> str | None:
        """Have the node know the namespace, so that it looks for its blocks in the bucket; or why it must not."""
        if namespace is None:
            return "unknown_namespace"
        if namespace.tenant != self._tenant:
            return "other_tenant"
        try:
            self._client.open_namespace(namespace, length)
        except IdentityError:
            return "other_block_size"
        except ConfigError:
            return "too_large_for_host"
        return None

    def _fetch(self, blocks: Sequence[HotBlock], tokens: Mapping[bytes, int]) -> None:
        failed: set[BlockKey] = set()
        undrained = 0
        for batch in _batches(blocks, self._host_bytes // 16):
            batch = [block for block in batch if not self._orphaned(block, failed)]
            where = self._where([block.key for block in batch])
            far = sum(block.nbytes for block in batch if where[block.key] not in (Medium.HOST, Medium.DISK))
            time.sleep(self._rate.reserve(far))
            missing = [block for block in batch if where[block.key] not in (Medium.HOST, Medium.DISK)]
            warm = [block for block in batch if where[block.key] in (Medium.HOST, Medium.DISK)]
            for block in warm:
                self._count(block, where[block.key], tokens)
            while missing:
                delivered, reason = self._acquire(missing)
                for block, medium in zip(missing, delivered, strict=False):
                    self._count(block, medium, tokens)
                    self.report.nbytes += block.nbytes * (medium not in (Medium.HOST, Medium.DISK))
                missing = missing[len(delivered) :]
                if missing and reason is not None and not (delivered and reason in PASSING):
                    failed.add(missing[0].key)
                    self.report.skipped[reason.value] += 1
                    missing = [block for block in missing[1:] if not self._orphaned(block, failed)]
            self._progress(self.report)
            undrained += far
            if undrained > self._host_bytes // 32:  # a full queue drops blocks: let the disk catch up
                self._client.call("drain", DRAIN_SECONDS + 5, timeout=DRAIN_SECONDS)
                undrained = 0

    def _acquire(self, blocks: Sequence[HotBlock]) -> tuple[tuple[Medium, ...], Miss | None]:
        """Promote a run of blocks; where each was, and why it ended early."""
        keys = [block.key for block in blocks]
        for attempt in range(TRIES):
            acquired = self._client.acquire(keys, ACQUIRE_SECONDS)
            self._client.release(keys[: len(acquired.media)])
            if acquired.media or acquired.miss not in PASSING:
                break
            if attempt < TRIES - 1:
                time.sleep(RETRY_SECONDS)
        return acquired.media, None if len(acquired.media) == len(keys) else acquired.miss

    def _bring_hottest_to_host(self, blocks: Sequence[HotBlock]) -> None:
        """Host memory now holds what came last; give it what is worth most, the very best at the end."""
        room = int(self._host_bytes * HOST_SHARE)
        if sum(block.nbytes for block in blocks) <= room:
            return
        best = []
        for block in blocks:
            room -= block.nbytes
            if room < 0:
                break
            best.append(block)
        for batch in reversed(list(_batches(best, self._host_bytes // 16))):
            keys = [block.key for block in batch]
            self._client.release(keys[: len(self._client.acquire(keys, ACQUIRE_SECONDS).media)])

    def _where(self, keys: Sequence[BlockKey]) -> dict[BlockKey, Medium | None]:
        """The fastest tier that holds each block. Does not count as a use."""
        where = {key: self._inspect(key) for key in keys}
        if unheard := [key for key, medium in where.items() if medium in (None, Medium.REMOTE)]:
            self._client.call("find", FIND_SECONDS, keys=join_keys(unheard))
        return where

    def _inspect(self, key: BlockKey) -> Medium | None:
        media = self._client.call("inspect", key=key)["media"]
        return Medium(media[0]) if media else None

    def _count(self, block: HotBlock, medium: Medium | None, tokens: Mapping[bytes, int]) -> None:
        assert medium is not None
        self._warmed.add(block.key)
        self.report.blocks[medium.value] += 1
        self.report.warm_bytes += block.nbytes
        self.report.tokens += tokens[block.namespace]

    def _take_back(self, blocks: Sequence[HotBlock], tokens: Mapping[bytes, int]) -> None:
        """A disk that is full keeps less than memory lets go of: what is on the node no more is not warm."""
        for block in blocks:
            if block.key in self._warmed and self._inspect(block.key) not in (Medium.HOST, Medium.DISK):
                self.report.skipped["not_kept"] += 1
                self.report.warm_bytes -= block.nbytes
                self.report.tokens -= tokens[block.namespace]

    def _orphaned(self, block: HotBlock, failed: set[BlockKey]) -> bool:
        if block.parent not in failed:
            return False
        failed.add(block.key)
        self.report.skipped[LeftOut.PARENT.value] += 1
        return True


def blocks_of_prompts(
    client: Client,
    namespace: Namespace,
    length: int,
    prompts: Iterator[Sequence[int]],
    held: Callable[[BlockKey], bool],
) -> tuple[HotSet, int]:
    """The hot set that consists of these prompts, first ones hottest, and how many of their blocks the bucket lacks.

    ``length``: payload bytes of the namespace's blocks. ``held``: whether the bucket has a block.
    """
    from kvstore.identity import chain_digests

    keyring = client.open_namespace(namespace, length)
    blocks: dict[BlockKey, HotBlock] = {}
    lacking = 0
    for number, prompt in enumerate(prompts):
        keys = keyring.block_keys(chain_digests(prompt, namespace.block_tokens))
        for place, key in enumerate(keys):
            if not held(key):
                lacking += len(keys) - place
                break
            parent = keys[place - 1] if place else NO_PARENT
            blocks.setdefault(key, HotBlock(key, parent, namespace.digest, length, 0.0, 1.0 / (1 + number)))
    label = label_of(namespace)
    return HotSet(list(blocks.values()), {label.digest: label}), lacking


def _batches(blocks: Sequence[HotBlock], nbytes: int) -> Iterator[list[HotBlock]]:
    """Runs of at most ``BATCH_BLOCKS`` blocks and ``nbytes``, but of one block at least."""
    batch: list[HotBlock] = []
    size = 0
    for block in blocks:
        if batch and (len(batch) == BATCH_BLOCKS or size + block.nbytes > nbytes):
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += envelope_bytes(block.length)
    if batch:
        yield batch
