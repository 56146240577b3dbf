"""A node for tests, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Self

from kvstore.config import Config, load
from kvstore.node.server import Node


class RunningNode:
    """A node with an event loop of its own; a context manager that stops it. Raises what kept the node from starting."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        """Files and socket go to ``directory``; ``overrides`` are ``section.key=value`` texts over a small default."""
        small = ["host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB"]
        places = [f"node.directory={directory}", f"node.socket={directory / 'node.sock'}"]
        self.config: Config = load(None, [*places, *small, *overrides], environ={}).config
        self.socket = self.config.node.socket
        self.node: Node
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="node")
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
            async with Node.open(self.config) as self.node:
                self._started.set()
                await self._stop.wait()

        try:
            self._loop.run_until_complete(main())
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._started.set()
            self._loop.close()
