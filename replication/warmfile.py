"""Tells how a warm-up fares, in the node's directory (``kvstore.warmth``)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from kvstore.warmth import WarmState, Warmth, write_warmth

if TYPE_CHECKING:
    from replication.warmup import WarmReport

log = structlog.get_logger(__name__)

EVERY_SECONDS = 0.3


class WarmthFile:
    """Keeps the file up to date. A directory that cannot be written is said once: the warm-up goes on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started = time.time()
        self._written = 0.0
        self._broken = False

    def progress(self, report: WarmReport) -> None:
        """Some of it is warm; written a few times a second."""
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self._write(report, WarmState.RUNNING)

    def end(self, report: WarmReport, problem: str = "") -> None:
        """``problem``: why it broke off."""
        state = WarmState.FAILED if problem else WarmState.CANCELLED if report.interrupted else WarmState.DONE
        self._write(report, state, problem)

    def _write(self, report: WarmReport, state: WarmState, problem: str = "") -> None:
        self._written = time.monotonic()
        now = time.time()
        warmth = Warmth(
            state=state,
            started=self._started,
            updated=now,
            finished=None if state is WarmState.RUNNING else now,
            planned_blocks=report.planned_blocks,
            planned_bytes=report.planned_bytes,
            warm_blocks=report.blocks.total(),
            warm_bytes=report.warm_bytes,
            fetched_bytes=report.nbytes,
            skipped=dict(report.skipped),
            problem=problem[:1000],
        )
        try:
            write_warmth(self._directory, warmth)
        except OSError as error:
            if not self._broken:
                log.warning("warmth not written: readiness checks see no progress", error=str(error))
            self._broken = True
