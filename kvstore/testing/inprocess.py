"""A node without a process: the whole ``NodeClient`` contract over one arena and a dict, host tier only.

For tests of engine connectors. One instance may stand for the node and for all of its clients.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.envelope import HEADER_BYTES, envelope_bytes
from kvstore.identity import BlockKey, Keyring, Namespace
from kvstore.node.api import About, Acquired, Description, Lookup, Miss, NewBlock, Plan, Report, Reserved
from kvstore.node.arena import Arena
from kvstore.slabs import SlabAllocator
from kvstore.tiers.base import Medium

_EXTENTS = 16


@dataclass(slots=True)
class _Slot:
    offset: int
    missing: set[int] = field(default_factory=set)
    """Parts not committed yet."""
    parts: int = 1
    leases: int = 0


class InProcessNode:
    """Implements ``kvstore.node.api.NodeClient``. Thread-safe."""

    def __init__(self, arena_bytes: int = 64 << 20, epoch: int = 1) -> None:
        extent = arena_bytes // _EXTENTS
        self._arena = Arena.create(extent * _EXTENTS, epoch)
        self._slabs = SlabAllocator(_EXTENTS, extent)
        self._sizes: dict[bytes, int] = {}
        self._slots: OrderedDict[BlockKey, _Slot] = OrderedDict()
        self._lock = threading.Lock()
        self.described: dict[str, Description] = {}
        """By request."""
        self.plan: Plan | None = None
        """What every lookup answers as the plan."""
        self.reports: list[Report] = []
        """What was reported, oldest first."""

    @property
    def epoch(self) -> int:
        return self._arena.epoch

    @property
    def keys(self) -> set[BlockKey]:
        """Published blocks."""
        with self._lock:
            return {key for key, slot in self._slots.items() if not slot.missing}

    def payload(self, key: BlockKey, length: int) -> memoryview:
        """The stored bytes, for tests that look or tamper."""
        return self._arena.slot(self._slots[key].offset + HEADER_BYTES, length)

    def open_namespace(self, namespace: Namespace, block_bytes: int) -> Keyring:
        self._sizes[namespace.digest] = envelope_bytes(block_bytes)
        return namespace.keyring(b"testing")

    def lookup(
        self,
        keys: Sequence[BlockKey],
        start: int = 0,
        timeout: float = 0.05,
        about: About | None = None,
        waiting: int | None = None,
        states: int = 0,
    ) -> Lookup:
        with self._lock:
            blocks = 0
            for key in keys[start:]:
                slot = self._slots.get(key)
                if slot is None or slot.missing:
                    break
                blocks += 1
        return Lookup(blocks, ((Medium.HOST, blocks),) if blocks else (), plan=self.plan)

    def holds(self, keys: Sequence[BlockKey], timeout: float = 0.05, namespace: Namespace | None = None) -> list[bool]:
        return [key in self.keys for key in keys]

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def describe(self, about: About, description: Description, timeout: float = 1.0) -> None:
        self.described[about.request] = description

    def acquire(self, keys: Sequence[BlockKey], timeout: float) -> Acquired:
        with self._lock:
            offsets = []
            for key in keys:
                slot = self._slots.get(key)
                if slot is None or slot.missing:
                    break
                slot.leases += 1
                self._slots.move_to_end(key)
                offsets.append(slot.offset + HEADER_BYTES)
        miss = None if len(offsets) == len(keys) else Miss.NOT_STORED
        return Acquired(self._arena, tuple(offsets), (Medium.HOST,) * len(offsets), miss)

    def release(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._slots[key].leases -= 1

    def reserve(
        self, namespace: Namespace, blocks: Sequence[NewBlock], part: int = 0, parts: int = 1, timeout: float = 1.0
    ) -> Reserved:
        offsets: list[int | None] = []
        misses: dict[int, Miss] = {}
        with self._lock:
            for position, block in enumerate(blocks):
                slot = self._slots.get(block.key)
                if slot is None:
                    offset = self._allocate(self._sizes[namespace.digest])
                    if offset is not None:
                        slot = self._slots[block.key] = _Slot(offset, set(range(parts)), parts)
                if slot is None:
                    misses[position] = Miss.NO_ROOM
                elif parts != slot.parts or part not in slot.missing or (parts == 1 and slot.leases):
                    misses[position] = Miss.PRESENT
                elif parts == 1:
                    slot.leases = 1  # being written: a second writer has nothing to do
                offsets.append(None if position in misses or slot is None else slot.offset + HEADER_BYTES)
        return Reserved(self._arena, tuple(offsets), misses)

    def commit(
        self, keys: Sequence[BlockKey], part: int = 0, durable: Medium = Medium.HOST, timeout: float = 10.0
    ) -> tuple[BlockKey, ...]:
        published = []
        with self._lock:
            for key in keys:
                slot = self._slots.get(key)
                if slot is None:
                    continue
                slot.missing.discard(part)
                if not slot.missing:
                    slot.leases = 0
                    published.append(key)
        return tuple(published)

    def abort(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                slot = self._slots.get(key)
                if slot is not None and slot.missing:
                    self._slabs.free(self._slots.pop(key).offset)

    def close(self) -> None:
        """Nothing to give up: the node and its client are one."""

    def _allocate(self, nbytes: int) -> int | None:
        offset = self._slabs.allocate(nbytes)
        while offset is None:
            victim = next((k for k, slot in self._slots.items() if not slot.missing and not slot.leases), None)
            if victim is None:
                return None
            self._slabs.free(self._slots.pop(victim).offset)
            offset = self._slabs.allocate(nbytes)
        return offset
