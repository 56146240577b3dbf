"""Every exception this package raises.

KVStoreError
├── ConfigError            an impossible or unknown setting: names the field, the value and the remedy
├── IdentityError          a namespace, key or layout that cannot be
├── ProtocolError          a peer broke the frame protocol, or speaks another version of it
├── NodeUnavailable        no node answers, or it went away
├── DeadlineExceeded       the answer did not come in time
├── AdminRefused           the admin API answered with a problem
├── CatalogUnavailable     the region's catalog does not answer
└── TierError
    ├── BlockNotFound      the tier does not hold the block
    ├── BlockCorrupt       the bytes are not the block they claim to be
    ├── BlockTooLarge      the block fits in no slot, or not in the buffer it is read into
    └── TierUnavailable    the tier cannot answer now (disk error, S3 outage, open breaker)
        └── TierRefused    it answered, and says no: a wrong key, a full quota

On an engine's path none of these escapes: a connector turns each into a miss and counts it with a reason.
"""


class KVStoreError(Exception):
    """Base of every exception of this package."""


class ConfigError(KVStoreError):
    """A setting that cannot work."""

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {problem}. {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


class IdentityError(KVStoreError):
    """A namespace, a key or a layout that cannot be."""


class ProtocolError(KVStoreError):
    """The peer broke the frame protocol."""


class NodeUnavailable(KVStoreError):
    """No node answers at the socket, or the connection was lost."""


class DeadlineExceeded(KVStoreError):
    """The answer did not arrive before the deadline."""


class AdminRefused(KVStoreError):
    """The admin API did not do what was asked: an HTTP status, why, and perhaps what to do."""

    def __init__(self, status: int, detail: str, remedy: str = "") -> None:
        super().__init__(f"{detail}. {remedy}" if remedy else detail)
        self.status = status
        self.detail = detail
        self.remedy = remedy


class CatalogUnavailable(KVStoreError):
    """The region's catalog cannot answer now; later it may."""


class TierError(KVStoreError):
    """A tier could not do what was asked."""


class BlockNotFound(TierError):
    """The tier does not hold the block."""


class BlockCorrupt(TierError):
    """The stored bytes are not the block that they claim to be."""


class OtherFormat(BlockCorrupt):
    """A block that another version of this package wrote, in a format that this one does not read. It is not damaged."""


class BlockTooLarge(TierError):
    """The block is larger than the place meant for it."""


class TierUnavailable(TierError):
    """The tier cannot answer now; later it may."""


class TierRefused(TierUnavailable):
    """The server answers, and will not: another way to it does not help."""
