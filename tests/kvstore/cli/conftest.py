from collections.abc import Iterator

import pytest
from cli_site import Site, running_site


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """For commands that change nothing."""
    with running_site() as site:
        yield site


@pytest.fixture
def site() -> Iterator[Site]:
    """For commands that do."""
    with running_site() as site:
        yield site
