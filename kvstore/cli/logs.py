"""Where log messages of a command go."""

from __future__ import annotations

import logging
import sys

import structlog

from kvstore import tracing


def _with_trace(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Name the trace that a message belongs to."""
    if trace := tracing.trace_id():
        event["trace_id"] = trace
    return event


def configure(level: str) -> None:
    """Log from ``level`` on to standard error: for people on a terminal, as JSON lines everywhere else."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _with_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # what standard error is at that moment
    )
