"""A service in a thread of the test's own process, with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from typing import Any, Self


class Background(ABC):
    """A context manager that stops the service. Starting raises what kept it from starting."""

    def __init__(self, name: str) -> None:
        """Start, in a thread of that name. Whatever ``open`` needs must be set before."""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()
        self._started.wait()
        if self._failures:
            self._thread.join()
            raise self._failures[0]

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[Any]:
        """The running service. Called in the thread's event loop."""

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
            async with self.open():
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
