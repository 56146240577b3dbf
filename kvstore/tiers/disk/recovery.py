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
    slot_sizes,
)
from kvstore.tiers.disk.segments import Segments


def recover(
    journal: Journal, journal_limit: int, segments: Segments, slots: SlabAllocator, pool: Executor
) -> Blocks:
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
    live: dict[bytes, int] = {}
    holders: dict[int, bytes] = {}
    uses: dict[int, int] = {}
    namespaces: list[bytes] = []
    columns = (kinds(records), records["slot"], records["key"])
    slots = records["slot"].tolist()
    for position, (kind, slot, key) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if kind == PUT:
            displaced = holders.get(slot)
            if displaced is not None and displaced != key and slots[live.get(displaced, position)] == slot:
                live.pop(displaced, None)
            live[key] = position
            holders[slot] = key
        elif kind == DELETE:
            if key in live and slots[live[key]] == slot:
                del live[key]
        elif kind == TOUCH:
            if key in live:
                uses[live[key]] = position
        elif kind == NAMESPACE:
            namespaces.append(key)
    positions = np.sort(np.fromiter(live.values(), dtype=np.intp, count=len(live)))
    used = np.array([uses.get(position, position) for position in positions.tolist()], dtype=np.intp)
    blocks = records[positions]
    blocks["kind_hits"] = put_word(hits(records[used]))
    blocks["accessed"] = records["accessed"][used]
    return Blocks(blocks[blocks["namespace"] < len(namespaces)], namespaces)


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
    claimed = [
        slots.claim(offset, size) for offset, size in zip(reversed(where), reversed(sizes), strict=True)
    ]
    return np.array(claimed[::-1], dtype=bool)
