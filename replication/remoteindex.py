"""What may be read from other regions on demand: their manifests, less what rules and tombstones forbid.

Pure, but for giving the interpreter away often: a full manifest is indexed in a thread beside the loop that engines wait for.
A million blocks take some 200 MB, most of it for the dict of keys, and while a new offer replaces an old one both are there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import slot_sizes
from kvstore.tiers.base import BlockStat
from kvstore.tombstones import Tombstone
from replication.manifest import HotBlock, Label, Rows, Table
from replication.topology import Flow, Topology

AT_ONCE = 8192
"""Keys between two chances for the event loop: about a millisecond."""

_ROW_BITS = 32
_ROW = (1 << _ROW_BITS) - 1


@dataclass(frozen=True, slots=True)
class Offered:
    """A block that may be read, and from where."""

    block: HotBlock
    tokens: int
    flow: Flow


@dataclass(slots=True)
class Share:
    """What one tenant may read. Owned by one event loop once it is built."""

    places: dict[BlockKey, int] = field(default_factory=dict)
    """The number of a block's source and its row there."""
    nbytes: int = 0
    """Of all their objects."""


class Offer:
    """All that may be read. The same block of several sources is read from the one whose flow is named first."""

    def __init__(self, tables: Sequence[Table], takers: Sequence[Sequence[Sequence[Flow]]]) -> None:
        """``takers``: for each table and each of its labels, the flows that bring such blocks here."""
        self.shares: dict[str, Share] = {}
        """By tenant."""
        self._tables = tables
        self._takers = takers

    def share(self, tenant: str) -> Share:
        return self.shares.get(tenant) or Share()

    def keys(self, tenant: str) -> AbstractSet[BlockKey]:
        return self.share(tenant).places.keys()

    def stat(self, tenant: str, key: BlockKey) -> BlockStat | None:
        """What the manifest says; a block's place in its chain is not known."""
        offered = self.find(tenant, key)
        if offered is None:
            return None
        block = offered.block
        return BlockStat(key, block.length, block.namespace, block.parent, tokens=offered.tokens)

    def find(self, tenant: str, key: BlockKey) -> Offered | None:
        place = self.share(tenant).places.get(key)
        if place is None:
            return None
        table = self._tables[place >> _ROW_BITS]
        row = table.rows[place & _ROW]
        parent, number, score = int(row["parent"]), int(row["namespace"]), float(row["score"])
        label = table.labels[number]
        above = BlockKey(table.rows["key"][parent].tobytes()) if parent >= 0 else NO_PARENT
        block = HotBlock(key, above, label.digest, int(row["length"]), float(row["created"]), score)
        flow = next(f for f in self._takers[place >> _ROW_BITS][number] if f.min_score <= score)
        return Offered(block, label.block_tokens, flow)

    def forget(self, tenant: str, keys: Collection[BlockKey]) -> dict[BlockKey, float]:
        """Offer these no more; when each that was offered had been created."""
        gone = {}
        for key in keys:
            if (offered := self.find(tenant, key)) is not None:
                share = self.shares[tenant]
                del share.places[key]
                share.nbytes -= offered.block.nbytes
                gone[key] = offered.block.created
        return gone


def compile_offer(
    tables: Sequence[Table],
    topology: Topology,
    region: str,
    tenants: Collection[str],
    tombstones: Sequence[Tombstone],
    flows: Sequence[Flow],
) -> Offer:
    """What ``region`` may read by ``flows`` for ``tenants`` of the regions that published ``tables``. Any thread."""
    rank = {flow.source: -place for place, flow in reversed(list(enumerate(flows)))}
    tables = sorted((table for table in tables if table.region in rank), key=lambda table: rank[table.region])
    takers = [[_takers(label, table.region, flows, topology, region) for label in table.labels] for table in tables]
    offer = Offer(tables, takers)
    for number, (table, taking) in enumerate(zip(tables, takers, strict=True)):  # what comes later replaces
        least = np.array([min((flow.min_score for flow in by), default=np.inf) for by in taking])
        wanted = np.zeros(len(table.rows), dtype=bool)
        if len(table.rows):
            wanted = (table.rows["score"] >= least[table.rows["namespace"]]) & ~_dead(table, tombstones)
        for tenant in tenants:
            mine = np.array([label.tenant == tenant for label in table.labels], dtype=bool)
            rows = np.flatnonzero(wanted & mine[table.rows["namespace"]]) if mine.any() else np.zeros(0, np.intp)
            _add(offer.shares.setdefault(tenant, Share()).places, table.rows, rows, number)
    for share in offer.shares.values():
        share.nbytes = sum(_sizes(tables, share.places))
    return offer


def _takers(label: Label, source: str, flows: Sequence[Flow], topology: Topology, region: str) -> list[Flow]:
    if not topology.permits(label, region):
        return []
    return [flow for flow in flows if flow.source == source and flow.takes(label)]


def _add(places: dict[BlockKey, int], rows: Rows, chosen: npt.NDArray[np.intp], number: int) -> None:
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        keys: list[BlockKey] = np.ascontiguousarray(rows["key"][part]).tolist()
        places.update(zip(keys, (part + (number << _ROW_BITS)).tolist(), strict=True))


def _sizes(tables: Sequence[Table], places: Mapping[BlockKey, int]) -> list[int]:
    """Bytes of the blocks of each table."""
    sizes = [0] * len(tables)
    every = iter(places.values())
    while len(part := np.fromiter(islice(every, AT_ONCE), dtype=np.int64)):
        numbers, rows = part >> _ROW_BITS, part & _ROW
        for number, table in enumerate(tables):
            sizes[number] += int(slot_sizes(table.rows["length"][rows[numbers == number]]).sum())
    return sizes


def _dead(table: Table, tombstones: Sequence[Tombstone]) -> npt.NDArray[np.bool_]:
    """Which rows are buried, as ``kvstore.tombstones.Graves`` judges them."""
    rows = table.rows
    until = np.full(len(table.labels), -np.inf)
    below = np.zeros(len(rows), dtype=bool)
    for stone in tombstones:
        meant = np.array([stone.covers(label.digest, label) for label in table.labels], dtype=bool)
        if not stone.prefix:
            until[meant] = np.maximum(until[meant], stone.time)
        elif (heads := np.flatnonzero(_equal(rows, stone.prefix))).size:
            below |= _below(rows, heads) & meant[rows["namespace"]] & (rows["created"] <= stone.time)
    dead: npt.NDArray[np.bool_] = below | (rows["created"] <= until[rows["namespace"]])
    return dead


def _equal(rows: Rows, key: bytes) -> npt.NDArray[np.bool_]:
    halves = np.ascontiguousarray(rows["key"]).view("<u8").reshape(-1, 2)
    found: npt.NDArray[np.bool_] = (halves == np.frombuffer(key, dtype="<u8")).all(axis=1)
    return found


def _below(rows: Rows, heads: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """The rows ``heads`` and all that continue them; parents come first."""
    below = np.zeros(len(rows) + 1, dtype=np.uint8)  # the last one stands for no parent
    below[heads] = 1
    marks = below.data
    for start in range(0, len(rows), AT_ONCE):
        for row, parent in enumerate(rows["parent"][start : start + AT_ONCE].tolist(), start):
            if marks[parent]:
                marks[row] = 1
    return below[:-1].astype(bool)
