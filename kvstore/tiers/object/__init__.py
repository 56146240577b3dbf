"""Blocks in an S3-compatible bucket, or in a folder that stands in for one.

tier        the tier: puts, gets, deletes, admission
├── contents    what is known to be there (pure bookkeeping)
├── survey      learning it: listing, headers, questions about single blocks
├── quarantine  where bad blocks go
├── budget      bytes in flight
├── peers       others who write to the same bucket
└── objects     verbs on named objects, over obstore
names, settings, documents (namespaces), probe (what the server really does), bucket (boto3: set-up, credentials, lifecycle)
"""

from kvstore.tiers.object.bucket import Bucket
from kvstore.tiers.object.peers import Peers
from kvstore.tiers.object.probe import ServerFeatures
from kvstore.tiers.object.quarantine import BadBlock
from kvstore.tiers.object.settings import ObjectSettings
from kvstore.tiers.object.tier import ObjectTier

__all__ = ["BadBlock", "Bucket", "ObjectSettings", "ObjectTier", "Peers", "ServerFeatures"]
