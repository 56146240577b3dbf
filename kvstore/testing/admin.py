"""An admin API for tests, in a thread of the test's own process."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from kvstore.admin.server import open_site, serving_site
from kvstore.admin.site import Site
from kvstore.config import load
from kvstore.testing.background import Background
from kvstore.testing.servers import free_port


class RunningApi(Background):
    """Serves on a free port of loopback, with an event loop of its own; a context manager that stops it.

    Raises what kept it from starting.
    """

    def __init__(self, directory: Path, *overrides: str, node: bool = True) -> None:
        """``directory`` is that of the node beside it, with its socket in it as ``RunningNode`` has it."""
        places = [f"node.directory={directory}", f"node.socket={directory / 'node.sock'}"]
        self.address = f"127.0.0.1:{free_port()}"
        self._loaded = load(None, [*places, f"api.listen={self.address}", *overrides], environ={})
        self.url = self._loaded.config.api.url
        self.site: Site
        """What its routes work with, for tests that change that."""
        self._with_node = node
        super().__init__("api")

    def open(self) -> AbstractAsyncContextManager[None]:
        self.site = open_site(self._loaded, self._with_node)
        return serving_site(self.site)
