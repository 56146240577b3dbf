"""From configuration to a listening server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial

import structlog
import uvicorn
from prometheus_client import CollectorRegistry

from kvstore.admin.app import create_app
from kvstore.admin.auth import Authenticate, everybody
from kvstore.admin.catalog import CatalogView
from kvstore.admin.guard import LOOPBACK
from kvstore.admin.jobs import Jobs
from kvstore.admin.node import NodeView
from kvstore.admin.peers import Peers, nobody
from kvstore.admin.site import Site
from kvstore.admin.tls import listening, towards_peers
from kvstore.admin.tokenizers import Tokenizers
from kvstore.admin.tokens import BearerTokens, Check, TokenBook, in_book
from kvstore.assembly import node_name
from kvstore.config import Loaded
from kvstore.config.schema import ApiSection
from kvstore.errors import ConfigError
from kvstore.tenants.credentials import operator_token

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
    app = create_app(site, None if api.asks_who else LOOPBACK | {api.address[0]})
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            **listening(api),
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


def open_site(loaded: Loaded, node: bool = True, registry: CollectorRegistry | None = None) -> Site:
    """What the routes of this configuration work with; ``registry``: a service's own metrics. Raises ConfigError."""
    config = loaded.config
    name = node_name(config.node.directory) if node else config.region.name
    catalog = CatalogView(config) if config.catalog.url else None
    named = [peer for peer in config.api.peers if peer != config.api.url]
    return Site(
        loaded,
        NodeView(config.node.socket, Tokenizers(config.api.tokenizers), partial(operator_token, config))
        if node
        else None,
        Jobs(config.node.directory / ("jobs" if node else "region-jobs")),
        name=name,
        url=config.api.url,
        peers=Peers(
            named,
            config.api.peer_token,
            partial(catalog.apis, name) if catalog is not None else nobody,
            towards_peers(config.api),
        ),
        catalog=catalog,
        registry=registry,
        authenticate=_authenticator(config.api),
    )


def _authenticator(api: ApiSection) -> Authenticate:
    checks: list[Check] = []
    if api.tokens is not None:
        checks.append(in_book(TokenBook(api.tokens)))
    if api.oidc_issuer:
        from kvstore.admin.oidc import OidcTokens

        checks.append(OidcTokens(api))
    return BearerTokens(*checks) if checks else everybody


class _Server(uvicorn.Server):
    """One that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    """Bound here, so that an address in use is a ConfigError and clients may connect at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
        # Inherited by connections. asyncio sets it itself only on sockets made with the protocol's number; without it a body
        # waits for the other side's acknowledgement of the head, 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            "api.listen",
            f"{host}:{port}",
            error.strerror or str(error),
            "Stop what listens there, or choose another port.",
        ) from error
