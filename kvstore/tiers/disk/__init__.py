"""The disk tier: blocks in slots of preallocated segment files, journalled, read and written past the page cache.

tier.py       DiskTier: the index, admission and eviction, in the event loop
  victims.py    which blocks to give up (pure)
  segments.py   slots in files, O_DIRECT
  journal.py    64-byte records of what is where, so that a restart is fast
  recovery.py   journal, or else slot headers, to blocks (pure but for reading)
  directory.py  lock and format file
  files.py      the system calls, where tests put faults
"""

from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.tier import BadBlock, DiskTier

__all__ = ["BadBlock", "DiskTier", "Files"]
