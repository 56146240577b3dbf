"""Two regions, each with an S3 server of its own, and a shaped link from the second to the first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from region_pair import Pair, bucket_on

from kvstore.testing.servers import S3Server, ServerUnavailable, ministack
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import ObjectSettings


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
    """The source's bucket as the destination reaches it, over a link that may be cut."""
    return replace(na, endpoint=link.endpoint, connect_timeout=3.0, read_timeout=3.0)


@pytest.fixture
def pair(na: ObjectSettings, eu: ObjectSettings, link: ShapedLink, tmp_path: Path) -> Pair:
    made = Pair(tmp_path / "regions.toml", na, eu, link)
    made.write()
    return made
