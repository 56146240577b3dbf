"""Places for blocks: host memory, local disk, object storage.

base.py      the interface that all of them share, and what they return
host.py      the shared arena: leases, reservations
disk/        segment files, journal, recovery
object/      S3-compatible stores, and a directory as the embedded stand-in
tasks.py     waiting for threads through cancellation
wrappers.py  metering, breaker, fault injection around any tier
"""
