"""How a service comes by an API, without loading what that needs where none is configured.

Beside a node it is a child process: it shares no interpreter with the data path, and ends with the node. Its standard input
is a pipe that the node holds open and never writes to: however the node ends, the pipe closes, and the API stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import structlog

from kvstore.config import Config, Loaded
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = structlog.get_logger(__name__)

FIRST_DELAY, LAST_DELAY = 1.0, 60.0
"""Seconds before an API that broke off is started again; they double."""
STOP_SECONDS = 5.0

BAD_INPUT = 2
"""Exit status of a command whose configuration is wrong: starting it again would not help."""


@contextlib.asynccontextmanager
async def beside(config: Config, options: Sequence[str]) -> AsyncIterator[None]:
    """Have an API process while the context lasts, if ``api.listen`` asks for one. Raises ConfigError.

    ``options``: those of the command line that ``config`` came from.
    """
    if not _wanted(config):
        yield
        return
    keeping = asyncio.create_task(_keep_running(options))
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


@contextlib.asynccontextmanager
async def inside(loaded: Loaded, registry: CollectorRegistry) -> AsyncIterator[None]:
    """For a service that has no node and no data path: the API in its own event loop while the context lasts, if
    ``api.listen`` asks for one. ``registry`` has the service's metrics. Raises ConfigError."""
    if not _wanted(loaded.config):
        yield
        return
    from kvstore.admin.server import open_site, serving_site

    async with serving_site(open_site(loaded, node=False, registry=registry)):
        yield


def _wanted(config: Config) -> bool:
    """Whether an API is configured. Raises ConfigError when its packages are not installed."""
    if config.api.listen and not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        remedy = "Install llm-kvstore[admin], or leave api.listen empty."
        raise ConfigError("api.listen", config.api.listen, "the packages of the API are not installed", remedy)
    return bool(config.api.listen)


async def _keep_running(options: Sequence[str]) -> None:
    delay = FIRST_DELAY
    while True:
        status = await _run(options)
        if status in (0, BAD_INPUT, -signal.SIGTERM):  # stopped on purpose, or of no use
            log.warning("the API ended; start it again with: kvstore api", status=status)
            return
        log.warning("the API broke off and is started again", status=status, seconds=delay)
        await asyncio.sleep(delay)
        delay = min(2 * delay, LAST_DELAY)


async def _run(options: Sequence[str]) -> int:
    """Run it once; its exit status. Cancelled, it closes the pipe and waits."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvstore", "api", "--with-node", *options, stdin=asyncio.subprocess.PIPE
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def node_gone() -> None:
    """Returns when standard input, the pipe from the node, closes."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass
