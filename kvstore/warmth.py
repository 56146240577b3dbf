"""How warm a node is: a small JSON file in the node's directory, ``warmth.json``.

Whoever warms the node replaces it whole a few times a second; readiness checks read it. It counts what was brought, so a
warm-up that was killed leaves a file that is still true: ``state`` says running, and ``share`` how far it came. What a node
keeps on its disk is warm over a restart; a node without a disk removes the file when it starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from kvstore.files import replace_file
from kvstore.parsing import parse_json

log = structlog.get_logger(__name__)

MAX_BYTES = 64 << 10


class WarmState(StrEnum):
    """What a warm-up is doing."""

    RUNNING = "running"
    DONE = "done"
    """It went through its whole plan; ``skipped`` says what of it could not be had."""
    FAILED = "failed"
    """It broke off; ``problem`` says why."""
    CANCELLED = "cancelled"
    """Somebody stopped it. The next one goes on from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """The last warm-up of a node. Times are seconds since the epoch."""

    state: WarmState
    started: float
    updated: float
    finished: float | None = None
    planned_blocks: int = 0
    planned_bytes: int = 0
    warm_blocks: int = 0
    """Of the plan, on the node's disk or in its memory."""
    warm_bytes: int = 0
    fetched_bytes: int = 0
    """Of those, taken from the bucket by this warm-up."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Blocks by the reason why they are not warm."""
    problem: str = ""

    @property
    def share(self) -> float:
        """Of the planned bytes, those that are warm. Without a plan 1 when the warm-up is done, else 0."""
        if self.planned_bytes:
            return self.warm_bytes / self.planned_bytes
        return float(self.state is WarmState.DONE)

    def enough(self, at_least: float) -> bool:
        """Whether the node may take traffic, whatever became of the warm-up."""
        return self.share >= at_least


def warmth_path(directory: Path) -> Path:
    """``directory`` is ``node.directory``."""
    return directory / "warmth.json"


def read_warmth(directory: Path) -> Warmth | None:
    """None when the node was never warmed, or the file cannot be read. Any thread; a few kB of I/O."""
    path = warmth_path(directory)
    try:
        with path.open("rb") as file:
            return _parse(parse_json(file.read(MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("warmth not read", file=str(path), error=str(error))
        return None


def write_warmth(directory: Path, warmth: Warmth) -> None:
    """Replace the file. Raises OSError. One writer at a time."""
    replace_file(warmth_path(directory), json.dumps({**asdict(warmth), "share": warmth.share}).encode())


def forget_warmth(directory: Path) -> None:
    """What was warm is gone. Raises OSError."""
    warmth_path(directory).unlink(missing_ok=True)


def _parse(fields: Any) -> Warmth:
    """Raises ValueError, TypeError, AttributeError."""
    fields.pop("share", None)
    warmth = Warmth(**{**fields, "state": WarmState(fields.get("state"))})
    numbers = (warmth.started, warmth.updated, warmth.finished or 0.0)
    counts = (warmth.planned_blocks, warmth.planned_bytes, warmth.warm_blocks, warmth.warm_bytes, warmth.fetched_bytes)
    if not all(type(count) is int and count >= 0 for count in (*counts, *warmth.skipped.values())):
        raise ValueError("a count that cannot be")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a time that cannot be")
    return warmth
