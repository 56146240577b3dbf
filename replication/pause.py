"""Sources that an operator has paused: kept in the destination's bucket, and heeded by every replicator of the region."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from kvstore.errors import BlockTooLarge
from kvstore.parsing import parse_json
from replication.links import Links
from replication.names import PAUSES

_MAX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is copied from the source. Its manifests are read all the same, so that purges arrive."""

    since: float
    """Seconds since the epoch."""
    by: str

    def __str__(self) -> str:
        return f"paused by {self.by} at {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(self.since))}"


async def read_pauses(bucket: Links) -> dict[str, Pause]:
    """By source. Raises TierUnavailable."""
    try:
        body = await bucket.read(PAUSES, _MAX_BYTES)
        return {str(source): Pause(**fields) for source, fields in parse_json(body or b"{}").items()}
    except (ValueError, TypeError, AttributeError, BlockTooLarge):
        return {}  # a file that cannot be read must not stop replication for ever


async def pause(bucket: Links, sources: Iterable[str], by: str) -> dict[str, Pause]:
    """Pause sources from the next round on; what is paused then. Raises TierUnavailable."""
    known = await read_pauses(bucket)
    return await _write(bucket, {**{source: Pause(time.time(), by) for source in sources}, **known})


async def resume(bucket: Links, sources: Iterable[str]) -> dict[str, Pause]:
    """Let sources go on; what is paused then. Raises TierUnavailable."""
    wanted = set(sources)
    known = await read_pauses(bucket)
    return await _write(bucket, {source: one for source, one in known.items() if source not in wanted})


async def _write(bucket: Links, pauses: Mapping[str, Pause]) -> dict[str, Pause]:
    body = json.dumps({source: asdict(one) for source, one in pauses.items()}).encode()
    await bucket.put(PAUSES, body, create=False)
    return dict(pauses)
