"""Where a region's service shows its metrics when it has no admin API to show them: a listener of their own."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from kvstore.config.schema import is_loopback
from kvstore.errors import ConfigError
from kvstore.tls import believe, show

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 10.0
"""How long a client may take to shake hands and to say what it wants."""


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where metrics are served, and who may ask. Raises ConfigError for what nobody should listen to.

    Elsewhere than on loopback ``client_ca`` is needed: a certificate is how Prometheus says who it is where there are no tokens.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    @classmethod
    def of(
        cls, address: str, certificate: Path | None = None, key: Path | None = None, client_ca: Path | None = None
    ) -> MetricsAddress:
        """``address`` as HOST:PORT; the files are PEM. Raises ConfigError."""
        match = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            raise ConfigError("--metrics", address, "not host:port", "Write it as 127.0.0.1:9400.")
        host = match[1].strip("[]")
        if bool(certificate) != bool(key):
            option = "--metrics-key" if certificate else "--metrics-certificate"
            raise ConfigError(option, "", "certificate and key come as a pair", "Give both.")
        if client_ca and not certificate:
            problem, remedy = "only TLS asks for certificates", "Give --metrics-certificate and --metrics-key too."
            raise ConfigError("--metrics-client-ca", str(client_ca), problem, remedy)
        if not is_loopback(host) and not client_ca:
            raise ConfigError(
                "--metrics",
                address,
                "others than this machine could reach it, and it does not ask who they are",
                "Listen on 127.0.0.1 or give --metrics-client-ca. With api.listen and api.tokens kvstore region run shows them "
                "at /metrics of its API, too.",
            )
        return cls(host, int(match[2]), certificate, key, client_ca)

    @contextmanager
    def serving(self, registry: CollectorRegistry) -> Iterator[None]:
        """Answer with what ``registry`` has, in threads, while the context lasts. Raises ConfigError."""
        server = self._server(registry)
        thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _server(self, registry: CollectorRegistry) -> WSGIServer:
        context = self._tls()
        try:
            server = make_server(
                self.host, self.port, make_wsgi_app(registry), _Server6 if ":" in self.host else _Server, _Handler
            )
        except OSError as error:
            raise ConfigError("--metrics", f"{self.host}:{self.port}", str(error), "Choose a free port.") from error
        if context is not None:
            # Hands are shaken where the request is read: while accepting, one client that says nothing would keep all others out.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        return server

    def _tls(self) -> ssl.SSLContext | None:
        if self.certificate is None or self.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        show(context, "--metrics-certificate", self.certificate, self.key)
        if self.client_ca is not None:
            believe(context, "--metrics-client-ca", self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("metrics not delivered", to=str(client_address), exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        pass
