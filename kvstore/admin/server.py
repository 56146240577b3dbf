"""From configuration to a listening server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import structlog
import uvicorn

from kvstore.admin.app import create_app
from kvstore.admin.catalog import CatalogView
from kvstore.admin.guard import LOOPBACK
from kvstore.admin.jobs import Jobs
from kvstore.admin.node import NodeView
from kvstore.admin.site import Site
from kvstore.admin.tokenizers import Tokenizers
from kvstore.assembly import node_name
from kvstore.config import Loaded
from kvstore.errors import ConfigError

log = structlog.get_logger(__name__)

GRACE_SECONDS = 2
"""What requests under way have, once the server stops."""


async def serve(loaded: Loaded, *, node: bool = True, started: asyncio.Event | None = None) -> None:
    """Listen at ``api.listen`` until cancelled. Raises ConfigError when that is not possible.

    ``node``: whether a node is beside it, at ``node.socket``; else only routes that need none are there. ``started`` is set
    once connections are accepted. The node may come and go meanwhile. Signals are the caller's business.
    """
    await serve_site(open_site(loaded, node), started)


@contextlib.asynccontextmanager
async def serving_site(site: Site) -> AsyncIterator[None]:
    """``serve_site`` in the background while the context lasts. Raises ConfigError."""
    started = asyncio.Event()
    server, waiting = asyncio.create_task(serve_site(site, started)), asyncio.create_task(started.wait())
    await asyncio.wait([server, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if server.done():
        server.result()
    try:
        yield
    finally:
        server.cancel()
        await asyncio.wait([server])


async def serve_site(site: Site, started: asyncio.Event | None = None) -> None:
    """The same for a site that is open already. It is of no use afterwards."""
    api = site.config.api
    if not api.listen:
        raise ConfigError("api.listen", "", "the API has no address to listen on", "Set it to 127.0.0.1:7070.")
    listener = _listen(*api.address)
    app = create_app(site, LOOPBACK | {api.address[0]})
    server = _Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    log.info("API listening", address=api.listen)
    if started is not None:
        started.set()
    try:
        await asyncio.shield(running)
    finally:
        site.closing.set()
        await site.jobs.close()
        server.should_exit = True
        await running


def open_site(loaded: Loaded, node: bool = True) -> Site:
    """What the routes of this configuration work with. Raises ConfigError."""
    config = loaded.config
    return Site(
        loaded,
        NodeView(config.node.socket, Tokenizers(config.api.tokenizers)) if node else None,
        Jobs(config.node.directory / ("jobs" if node else "region-jobs")),
        name=node_name(config.node.directory) if node else config.region.name,
        url=f"http://{config.api.listen}",
        catalog=CatalogView(config) if config.catalog.url else None,
    )


class _Server(uvicorn.Server):
    """One that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    """Bound here, so that an address in use is a ConfigError and clients may connect at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            "api.listen",
            f"{host}:{port}",
            error.strerror or str(error),
            "Stop what listens there, or choose another port.",
        ) from error
