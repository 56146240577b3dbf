"""APIs for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_site import Site, api_site


@pytest.fixture(scope="session")
def shared_api() -> Iterator[Site]:
    """For tests that change nothing."""
    with api_site() as site:
        yield site


@pytest.fixture
def own_api() -> Iterator[Site]:
    """For tests that do."""
    with api_site() as site:
        yield site
