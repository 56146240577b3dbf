"""An admin API for tests, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Self

from kvstore.admin.server import open_site, serving_site
from kvstore.admin.site import Site
from kvstore.config import load
from kvstore.testing.servers import free_port


class RunningApi:
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
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="api")
        self._thread.start()
        self._started.wait()
        if self._failures:
            self._thread.join()
            raise self._failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop as SIGTERM would, and wait. Raises what went wrong meanwhile."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        if self._failures:
            raise self._failures[0]

    def _run(self) -> None:
        async def main() -> None:
            self.site = open_site(self._loaded, self._with_node)
            async with serving_site(self.site):
                self._started.set()
                await self._stop.wait()

        try:
            self._loop.run_until_complete(main())
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._started.set()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
