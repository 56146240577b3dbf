"""Two regions, each with an S3 server of its own, and a shaped link from the second to the first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.testing.servers import S3Server, ServerUnavailable, ministack
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import Bucket, ObjectSettings


@pytest.fixture(scope="session")
def far_server() -> Iterator[S3Server]:
    try:
        with ministack() as server:
            yield server
    except ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def random_source(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def bucket_on(server: S3Server, name: str) -> ObjectSettings:
    settings = ObjectSettings(
        url=f"s3://{name}-{random.randbytes(5).hex()}/prod",
        endpoint=server.endpoint,
        region=server.region,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        connect_timeout=1.0,
        read_timeout=1.0,
        request_timeout=30.0,
        retries=0,
    )
    Bucket(settings).create()
    return settings


@pytest.fixture
def na(far_server: S3Server) -> ObjectSettings:
    """The source's bucket, without a link in between."""
    return bucket_on(far_server, "na")


@pytest.fixture
def eu(ministack_server: S3Server) -> ObjectSettings:
    """The destination's bucket."""
    return bucket_on(ministack_server, "eu")


@pytest.fixture
def link(na: ObjectSettings) -> Iterator[ShapedLink]:
    """The way from eu to na."""
    with shaped(na.endpoint, Shape(delay=0.005)) as running:
        yield running


@pytest.fixture
def na_far(na: ObjectSettings, link: ShapedLink) -> ObjectSettings:
    """The source's bucket as the destination reaches it."""
    return replace(na, endpoint=link.endpoint)
