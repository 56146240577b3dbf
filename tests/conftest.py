"""Real S3 servers, one of each for the whole run, and a bucket for each test. Hypothesis does not judge a test by its pace."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from kvstore.testing.servers import S3Server, ServerUnavailable, ministack, radosgw
from kvstore.tiers.object import Bucket, ObjectSettings

settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")


@pytest.fixture(scope="session")
def _one_loader() -> Iterator[None]:
    """boto3's descriptions of services are parsed once, not for each client: that takes longer than most tests."""
    from botocore.loaders import create_loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", cache(create_loader))
        yield


def _serve(server: AbstractContextManager[S3Server]) -> Iterator[S3Server]:
    try:
        running = server.__enter__()
    except ServerUnavailable as error:
        pytest.skip(str(error))
    try:
        yield running
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def ministack_server(_one_loader: None) -> Iterator[S3Server]:
    yield from _serve(ministack())


@pytest.fixture(scope="session")
def radosgw_server(_one_loader: None) -> Iterator[S3Server]:
    yield from _serve(radosgw())


@pytest.fixture(params=["ministack", "radosgw"])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each server in turn."""
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def s3_settings(s3_server: S3Server) -> ObjectSettings:
    """An empty bucket on each server in turn."""
    return fresh_bucket(s3_server)


@pytest.fixture
def ministack_settings(ministack_server: S3Server) -> ObjectSettings:
    """An empty bucket on ministack, which keeps it over a restart."""
    return fresh_bucket(ministack_server)


def fresh_bucket(server: S3Server) -> ObjectSettings:
    settings = ObjectSettings(
        url=f"s3://test-{uuid.uuid4().hex[:12]}/some/prefix",
        endpoint=server.endpoint,
        region=server.region,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        ca_file=server.ca_file,
    )
    Bucket(settings).create()
    return settings
