"""Fetches the manifest of another region, and says since when a region that does not answer has been away."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from kvstore.errors import BlockTooLarge, TierUnavailable
from replication.cursor import Cursor
from replication.links import Links
from replication.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestRefused, open_manifest
from replication.names import manifest_name
from replication.topology import Topology

log = structlog.get_logger(__name__)

UNPUBLISHED = "it has not published a manifest yet"


@dataclass(frozen=True, slots=True)
class Pulled:
    """A manifest that may be believed."""

    cursor: Cursor
    manifest: Manifest
    raw: bytes


@dataclass(frozen=True, slots=True)
class Missed:
    """There is none for now."""

    cursor: Cursor
    problem: str


async def pull(source: str, far: Links, near: Links, topology: Topology) -> Pulled | Missed:
    """Ask ``source``, to which ``far`` leads, for its manifest. Raises TierUnavailable when ``near`` does not answer."""
    cursor = await Cursor.load(near, source)
    try:
        raw = await far.read(manifest_name(source), MAX_MANIFEST_BYTES)
    except TierUnavailable as error:
        cursor.away_since = cursor.away_since or time.time()
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(cursor.away_since))
        log.warning("no manifest", source=source, away_since=since, error=str(error))
        return Missed(cursor, f"away since {since}: {error}")
    except BlockTooLarge as error:
        return _refused(cursor, error)
    cursor.away_since = 0.0
    if raw is None:
        return Missed(cursor, UNPUBLISHED)
    try:
        manifest = open_manifest(raw, source, topology.key_of(source), cursor.sequence)
    except ManifestRefused as error:
        return _refused(cursor, error)
    return Pulled(cursor, manifest, raw)


async def believe(pulled: Pulled, near: Links) -> None:
    """Remember the manifest: against replays, and as the hot set for warming nodes here. Raises TierUnavailable."""
    cursor, manifest = pulled.cursor, pulled.manifest
    if manifest.sequence > cursor.sequence:
        await near.put(manifest_name(cursor.source), pulled.raw, create=False)
        cursor.sequence, cursor.published = manifest.sequence, manifest.published
        await cursor.save(near)


def _refused(cursor: Cursor, error: Exception) -> Missed:
    log.warning("no manifest", source=cursor.source, error=str(error))
    return Missed(cursor, str(error))
