"""A collector of OpenTelemetry spans on loopback, for tests: OTLP over HTTP, kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass(frozen=True, slots=True)
class Collected:
    """A span as it arrived. Ids are hex; a root's parent is empty."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    attributes: Mapping[str, str]


class Collector:
    """Takes what exporters post to ``endpoint`` while the context lasts. Needs the packages of the extra ``otel``."""

    def __init__(self) -> None:
        self.spans: list[Collected] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                import gzip

                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                encoded = handler.headers.get("Content-Encoding") == "gzip"
                self.spans += _spans(gzip.decompress(body) if encoded else body)
                handler.send_response(200)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="collector")
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of(self, trace: str) -> list[Collected]:
        """The spans of a trace."""
        return [span for span in self.spans if span.trace == trace]


def _spans(body: bytes) -> list[Collected]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    message = ExportTraceServiceRequest.FromString(body)
    return [
        Collected(
            service=next(a.value.string_value for a in group.resource.attributes if a.key == "service.name"),
            name=span.name,
            trace=span.trace_id.hex(),
            span=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            attributes={a.key: str(a.value) for a in span.attributes},
        )
        for group in message.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]
