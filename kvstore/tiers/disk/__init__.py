"""The disk tier: blocks in slots of preallocated segment files, journalled, read and written past the page cache.

tier.py         DiskTier: reads, writes, commits and deletions, in the event loop
  room.py         slots for new blocks: free ones, new segments, eviction
    victims.py      which blocks to give up (pure)
  opening.py      lock, format, recovery: from a directory to an open tier
    directory.py    the lock and the format file
    recovery.py     the journal, or else the slot headers, to blocks
  journal.py      the journal file
    records.py      its 64-byte records (pure)
  segments.py     slots in files, O_DIRECT
  files.py        the system calls, where tests put faults
"""

from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.tier import BadBlock, DiskTier

__all__ = ["BadBlock", "DiskTier", "Files"]
