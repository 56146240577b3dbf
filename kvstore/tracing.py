"""Traces of requests, from the engine's connector over the node and its tiers to the bucket: OpenTelemetry spans.

Off until ``start``. A span is then a function call, and nothing of OpenTelemetry is imported. Spans carry ids of requests and
blocks, counts and seconds; never tokens or text.

The current span follows threads and tasks as context variables do: what a task starts is a child of the span it was made in.
Between processes a span travels as W3C's ``traceparent``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

MAX_CHARS = 64
"""Of a ``traceparent``; version 0 has 55."""

EXPORT_SECONDS = 5.0
"""How long a collector may take to accept spans, and a process that stops to hand over its last."""

_FORM = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

Value = str | int | float | bool | bytes
"""Of an attribute. Bytes (block keys, digests) are shown as hex."""


class Span(Protocol):
    """What is known of a piece of work."""

    def set(self, **attributes: Value) -> None:
        """Add what became known meanwhile."""


class _Nothing:
    def set(self, **attributes: Value) -> None:
        pass


class _Live:
    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_plain(attributes))


class _Tracer:
    """The OpenTelemetry side of this module."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer("kvstore")
        self._headers = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, parent: str, attributes: Mapping[str, Value]) -> Iterator[_Live]:
        context = self._headers.extract({"traceparent": parent}) if _FORM.fullmatch(parent) else None
        with self._tracer.start_as_current_span(name, context, attributes=_plain(attributes)) as span:
            yield _Live(span)

    def traceparent(self) -> str:
        headers: dict[str, str] = {}
        self._headers.inject(headers)
        return headers.get("traceparent", "")

    def trace_id(self) -> str:
        context = self._trace.get_current_span().get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid and context.trace_flags.sampled else ""


_nothing = nullcontext(_Nothing())
_tracer: _Tracer | None = None


def span(name: str, parent: str = "", /, **attributes: Value) -> AbstractContextManager[Span]:
    """A piece of work, current while the context lasts; an exception marks it as failed. Any thread.

    ``parent`` is a ``traceparent`` from outside; without one, or with one that is malformed, the current span is the parent.
    """
    return _nothing if _tracer is None else _tracer.span(name, parent, attributes)


def traceparent() -> str:
    """The current span, for another process; empty when there is none."""
    return "" if _tracer is None else _tracer.traceparent()


def trace_id() -> str:
    """Of the current span as 32 hex digits, if it is being recorded; else empty."""
    return "" if _tracer is None else _tracer.trace_id()


def exemplar() -> dict[str, str] | None:
    """Labels of an exemplar for a histogram: the trace that the observation belongs to."""
    found = trace_id()
    return {"trace_id": found} if found else None


def start(service: str, endpoint: str, sample_ratio: float) -> None:
    """Send spans of this process to an OTLP collector from now on; nothing happens when ``endpoint`` is empty, or again.

    ``endpoint``: as ``http://127.0.0.1:4318``. ``sample_ratio``: share of the traces that begin in this process; what has a
    parent is recorded when the parent is. Spans are sent from a thread; what a collector that is away or slow leaves waiting
    is dropped beyond a bound. Raises ConfigError when OpenTelemetry is not installed.
    """
    global _tracer
    if not endpoint or _tracer is not None:
        return
    if not all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))):
        problem, remedy = "the packages for traces are not installed", "Install llm-kvstore[otel], or leave it empty."
        raise ConfigError("telemetry.otlp_endpoint", endpoint, problem, remedy)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        resource=Resource.create({"service.name": service}), sampler=ParentBased(TraceIdRatioBased(sample_ratio))
    )
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _Tracer(provider)


def stop() -> None:
    """Hand over the last spans and be off again."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer is not None:
        tracer.provider.shutdown()


@contextmanager
def exporting(service: str, endpoint: str, sample_ratio: float) -> Iterator[None]:
    """``start`` and ``stop`` around the life of a process. Raises ConfigError."""
    start(service, endpoint, sample_ratio)
    try:
        yield
    finally:
        stop()


def _plain(attributes: Mapping[str, Value]) -> dict[str, str | int | float | bool]:
    return {f"kvstore.{name}": value.hex() if isinstance(value, bytes) else value for name, value in attributes.items()}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
