"""A few seconds of coverage-guided fuzzing of each format; ``make fuzz`` runs longer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")
BOUNDS = ["-timeout=10", "-max_len=16384"]
"""An input that takes ten seconds is a finding; so is one that takes a gibibyte, a bound that the harness sets."""


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", ["protocol", "envelope", "journal", "manifest", "documents", "configuration"])
def test_nothing_but_refusals_comes_of_any_bytes(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HARNESS), target, *BOUNDS, "-max_total_time=3"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nfound: {sorted(path.name for path in tmp_path.iterdir())}"
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 10, "it was not fuzzed at all"
