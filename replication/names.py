"""Names of the objects that regions keep beside their blocks, relative to the bucket's prefix.

* ``manifests/{region}/hot.manifest``: the region's signed hot set; in its own bucket, and a copy wherever it was pulled
* ``replication/{source}.json``: how far this region has come with each source
* ``leases/{role}/{epoch}.json``: who does a job that only one may do
* ``duties/{role}.json``: how that job fares
* ``retention/uses.msgpack``, ``retention/retired.msgpack``: when blocks were used last, and which were retired
* ``spent/{flow}/{month}/{node}/{bytes}``: what a node has charged a flow for reading on demand
* ``replication-pauses.json``: sources from which nothing is copied for now
"""

from __future__ import annotations

from hashlib import blake2b

MANIFESTS = "manifests"
CURSORS = "replication"
LEASES = "leases"
USES = "retention/uses.msgpack"
RETIRED = "retention/retired.msgpack"
PAUSES = "replication-pauses.json"
SPENT = "spent"


def manifest_name(region: str) -> str:
    return f"{MANIFESTS}/{region}/hot.manifest"


def cursor_name(source: str) -> str:
    return f"{CURSORS}/{source}.json"


def lease_name(role: str, epoch: int) -> str:
    return f"{LEASES}/{role}/{epoch:012d}.json"


def charges_folder(flow: str, month: str) -> str:
    return f"{SPENT}/{blake2b(flow.encode(), digest_size=8).hexdigest()}/{month}"


def duty_name(role: str) -> str:
    return f"duties/{role}.json"
