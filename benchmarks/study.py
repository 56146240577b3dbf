"""What a study is, and how its result is judged and kept."""

from __future__ import annotations

import json
import operator
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Study:
    """A measurement with targets. A module in this package offers one as ``STUDY``."""

    name: str
    summary: str
    """One line for ``python -m benchmarks``."""
    run: Callable[[Any], Mapping[str, float]]
    """Measures (printing progress and a table as it likes, to stderr or with rich) and returns the figures by name."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Per figure a bound such as ``>=0.95``."""
    arguments: Callable[[Any], None] | None = None
    """Adds the study's own options to an argparse parser."""


def judge(figures: Mapping[str, float], targets: Mapping[str, str]) -> dict[str, bool]:
    """Whether each targeted figure is within its bound; a missing figure is not."""
    verdicts = {}
    for name, bound in targets.items():
        sign = bound[:2] if bound[:2] in _COMPARE else bound[:1]
        value = figures.get(name)
        verdicts[name] = value is not None and _COMPARE[sign](value, float(bound[len(sign) :]))
    return verdicts


def environment() -> dict[str, Any]:
    """The machine, as far as it matters to a reader of the figures."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    """The GPU of a study that used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def report(study: Study, figures: Mapping[str, float], command: str) -> dict[str, Any]:
    """The one object that a study prints and keeps."""
    return {
        "study": study.name,
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "targets": dict(study.targets),
        "met": all(judge(figures, study.targets).values()),
        "environment": environment(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(result: Mapping[str, Any]) -> Path:
    path = RESULTS / f"{result['study']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
