"""The bucket itself: does it exist, may we use it, what does its server do, which rules clean it up.

Over boto3, which knows every way to find credentials and names every error; imported on first use, because it takes half a
second. Blocking: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.tiers.object.names import QUARANTINE, SCRATCH
from kvstore.tiers.object.settings import ObjectSettings

log = structlog.get_logger(__name__)

QUARANTINE_DAYS = 14
"""How long a bad object is kept for whoever wants to know what happened to it."""

_REFUSED = {
    "403",
    "401",
    "AccessDenied",
    "AuthFailure",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_MISSING = {"404", "NoSuchBucket"}
_ELSEWHERE = {"301", "307", "AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"}


class Bucket:
    """Control of the bucket that ``settings`` name."""

    def __init__(self, settings: ObjectSettings) -> None:
        self.settings = settings
        self._client: Any = None

    def check(self) -> None:
        """Make sure that the bucket is there and may be listed; create it if the settings say so.

        Raises ConfigError (no credentials, wrong ones, no bucket) or TierUnavailable (no answer).
        """
        with self._errors() as client:
            try:
                client.list_objects_v2(Bucket=self.settings.bucket, Prefix=self._under(SCRATCH), MaxKeys=1)
            except client.exceptions.NoSuchBucket:
                if not self.settings.create_bucket:
                    raise
                self.create()
                self._tidy()

    def _tidy(self) -> None:
        """Give a bucket that we made our rules. Some servers have none."""
        try:
            self.set_lifecycle()
        except (ConfigError, TierUnavailable) as error:
            log.warning("no lifecycle rules: clean the bucket's quarantine by hand", error=str(error))

    def create(self) -> None:
        """Create the bucket; one that is ours already is as good."""
        with self._errors() as client:
            region = client.meta.region_name
            options = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            try:
                client.create_bucket(Bucket=self.settings.bucket, **options)
            except client.exceptions.BucketAlreadyOwnedByYou:
                pass

    def verifies_checksums(self) -> bool:
        """Whether the server refuses a body that its ``x-amz-checksum-crc32c`` header belies."""
        name = self._under(f"{SCRATCH}/checksum")
        with self._errors() as client:
            try:
                client.put_object(Bucket=self.settings.bucket, Key=name, Body=b"x", ChecksumCRC32C="AAAAAA==")
            except client.exceptions.ClientError as error:
                return _code(error) not in _REFUSED | _MISSING
            client.delete_object(Bucket=self.settings.bucket, Key=name)
            return False

    def lifecycle(self) -> list[dict[str, Any]]:
        """The bucket's rules, as S3 describes them."""
        with self._errors() as client:
            try:
                rules = client.get_bucket_lifecycle_configuration(Bucket=self.settings.bucket).get("Rules", [])
            except client.exceptions.ClientError as error:
                if _code(error) == "NoSuchLifecycleConfiguration":
                    return []
                raise
            return list(rules)

    def set_lifecycle(self) -> None:
        """Add our rules to the bucket's: quarantined objects expire, broken uploads are cleaned up. Others stay."""
        ours = [
            self._rule("quarantine", f"{QUARANTINE}/", Expiration={"Days": QUARANTINE_DAYS}),
            self._rule("uploads", "", AbortIncompleteMultipartUpload={"DaysAfterInitiation": 1}),
        ]
        names = {rule["ID"] for rule in ours}
        rules = [rule for rule in self.lifecycle() if rule.get("ID") not in names] + ours
        with self._errors() as client:
            client.put_bucket_lifecycle_configuration(
                Bucket=self.settings.bucket, LifecycleConfiguration={"Rules": rules}
            )

    def _rule(self, purpose: str, below: str, **action: Any) -> dict[str, Any]:
        """A rule of ours; its name has the prefix in it, because a bucket may be shared."""
        name = f"kvstore-{purpose} {self.settings.prefix}".strip()
        return {"ID": name, "Status": "Enabled", "Filter": {"Prefix": self._under(below)}, **action}

    def _under(self, name: str) -> str:
        return f"{self.settings.prefix}/{name}" if self.settings.prefix else name

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        """The client, with its exceptions translated."""
        import botocore.exceptions

        try:
            self._client = self._client or connect(self.settings)
            yield self._client
        except botocore.exceptions.ClientError as error:
            raise _explain(error, self.settings) from error
        except botocore.exceptions.NoCredentialsError as error:
            remedy = "Set access_key_id and secret_access_key, or configure the AWS environment."
            raise ConfigError("object.access_key_id", "", "the AWS environment has no credentials", remedy) from error
        except botocore.exceptions.BotoCoreError as error:
            raise TierUnavailable(f"{self.settings.endpoint or 'AWS S3'}: {error}") from error


def connect(settings: ObjectSettings) -> Any:
    """A boto3 S3 client that fails within the same times as the data path."""
    import boto3
    from botocore.config import Config

    own = {}
    if settings.access_key_id:
        own = {
            "aws_access_key_id": settings.access_key_id,
            "aws_secret_access_key": settings.secret_access_key,
            "aws_session_token": settings.session_token or None,
        }
    session = boto3.Session()
    return session.client(
        "s3",
        endpoint_url=settings.endpoint or None,
        region_name=settings.region or session.region_name or "us-east-1",
        verify=str(settings.ca_file) if settings.ca_file else None,
        config=Config(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.request_timeout,
            # Not boto3's older mode: that one tries a refused checksum again, and waits up to three seconds between.
            retries={"total_max_attempts": settings.retries + 1, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if settings.path_style else "virtual"},
        ),
        **own,
    )


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _explain(error: Any, settings: ObjectSettings) -> Exception:
    code = _code(error)
    if code in _REFUSED:
        remedy = "Check the access key, its secret, the region, and the key's rights on the bucket."
        return ConfigError("object.access_key_id", settings.access_key_id, f"the server refuses it ({code})", remedy)
    if code in _MISSING:
        remedy = "Create the bucket, or set create_bucket."
        return ConfigError("object.url", settings.url, "there is no such bucket", remedy)
    if code in _ELSEWHERE:
        remedy = "Set region to the bucket's region."
        return ConfigError("object.region", settings.region, f"the bucket is in another region ({code})", remedy)
    return TierUnavailable(f"{settings.endpoint or 'AWS S3'} answered {code}")
