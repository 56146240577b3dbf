"""What a directory holds: from its journal, or from the slot headers when the journal is lost.

Which block is in a slot, after a crash at any point:

* The journal lists a block only after its bytes are durable, so a torn or unacknowledged write is not listed.
* A slot given up is journalled before it is written again. Should that record be lost with the machine's power, the later
  record of the same slot displaces the earlier one, and a slot that was being overwritten fails verification when read.
* Slots given up have their headers erased, so a scan does not bring back what was deleted. It may list a write that was
  never acknowledged; if that write was torn, it fails verification when read.
* Of two copies of a key, a scan takes the one of the highest generation, then the youngest; a journal the last one.
"""

from __future__ import annotations

import mmap
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from kvstore.envelope import HEADER_BYTES, Header
from kvstore.errors import BlockCorrupt
from kvstore.identity import BlockKey
from kvstore.index import slot_sizes
from kvstore.slabs import SlabAllocator
from kvstore.tiers.disk.journal import Journal
from kvstore.tiers.disk.records import (
    DELETE,
    NAMESPACE,
    PUT,
    RECORD,
    RECORD_BYTES,
    TOUCH,
    Blocks,
    Put,
    Records,
    decode,
    encode,
    hits,
    kinds,
    offsets,
    put_word,
)
from kvstore.tiers.disk.segments import Segments


def recover(journal: Journal, journal_limit: int, segments: Segments, slots: SlabAllocator, pool: Executor) -> Blocks:
    """All blocks found, their slots claimed; leaves ``journal`` ready to append. Blocks; raises OSError."""
    records, whole = decode(journal.read(journal_limit))
    if whole and (len(records) or not segments.numbers()):
        blocks = replay(records)
        journal.resume(len(records) * RECORD_BYTES, blocks.namespaces)
    else:
        blocks = scan(segments, pool)
        journal.rewrite(blocks)
    return Blocks(blocks.records[_claimed(slots, blocks.records)], blocks.namespaces)


def replay(records: Records) -> Blocks:
    """The blocks that are left after all records, in the order in which they were put."""
    kind, slots, keys = kinds(records), records["slot"].tolist(), records["key"].tolist()
    live, holders, start = _leading_puts(kind, slots, keys)
    uses: dict[int, int] = {}
    for position, what in enumerate(kind[start:].tolist(), start):
        key, slot = keys[position], slots[position]
        known = live.get(key)
        if what == PUT:
            displaced = live.get(holders.get(slot, key))
            if displaced is not None and displaced != known and slots[displaced] == slot:
                del live[keys[displaced]]
            live[key] = position
            holders[slot] = key
        elif known is not None and what == TOUCH:
            uses[known] = position
        elif known is not None and what == DELETE and slots[known] == slot:
            del live[key]
    positions = np.sort(np.fromiter(live.values(), dtype=np.intp, count=len(live)))
    last_use = np.array([uses.get(position, position) for position in positions.tolist()], dtype=np.intp)
    blocks = records[positions]
    blocks["kind_hits"] = put_word(hits(records[last_use]))
    blocks["accessed"] = records["accessed"][last_use]
    namespaces = records["key"][kind == NAMESPACE].tolist()
    return Blocks(blocks[blocks["namespace"] < len(namespaces)], namespaces)


def _leading_puts(
    kind: npt.NDArray[np.uint32], slots: list[int], keys: list[bytes]
) -> tuple[dict[bytes, int], dict[int, bytes], int]:
    """What the first records say as long as they only put: all there is after a rewrite, so worth a shortcut.

    Position by key, key by slot, and how many records these are.
    """
    puts = (kind == PUT) | (kind == NAMESPACE)
    end = len(kind) if puts.all() else int(np.argmin(puts))
    positions = np.flatnonzero(kind[:end] == PUT).tolist()
    live = {keys[position]: position for position in positions}
    holders = {slots[position]: keys[position] for position in positions}
    if len(live) == len(holders) == len(positions):
        return live, holders, end
    return {}, {}, 0


def scan(segments: Segments, pool: Executor) -> Blocks:
    """The blocks whose slot headers verify; their recency is their creation."""
    best: dict[BlockKey, Put] = {}
    for found in pool.map(lambda number: _scan_segment(segments, number), segments.numbers()):
        for block in found:
            rival = best.get(block.header.key)
            if rival is None or _rank(block.header) > _rank(rival.header):
                best[block.header.key] = block
    namespaces: dict[bytes, int] = {}
    records = np.frombuffer(encode(best.values(), namespaces), RECORD)
    return Blocks(records[kinds(records) == PUT], list(namespaces))


def _rank(header: Header) -> tuple[int, float]:
    return header.generation, header.created


def _scan_segment(segments: Segments, number: int) -> list[Put]:
    found = []
    slots = segments.slots(number)
    with mmap.mmap(-1, HEADER_BYTES) as memory, memoryview(memory) as buffer:
        for offset in slots:
            count = segments.read(offset, buffer)
            try:
                header = Header.unpack(buffer[:count])
            except BlockCorrupt:
                continue
            if header.envelope_bytes == slots.step:
                found.append(Put(header, offset, header.created))
    return found


def _claimed(slots: SlabAllocator, records: Records) -> npt.NDArray[np.bool_]:
    """Which blocks have the slot that they name; of two that overlap, the newer one."""
    where, sizes = offsets(records).tolist(), slot_sizes(records["length"]).tolist()
    claimed = [slots.claim(offset, size) for offset, size in zip(reversed(where), reversed(sizes), strict=True)]
    return np.array(claimed[::-1], dtype=bool)
