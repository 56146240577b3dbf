"""The SGLang backend in SGLang's own virtual environment: over its host pools, against vLLM's layouts, under its cache tree."""

from __future__ import annotations

import subprocess

import pytest
from sglang_process import HERE, ROOT, environment, sglang_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_in_sglangs_environment() -> None:
    """The files of ``sglang/`` are suites for the interpreter that has SGLang."""
    folder = HERE / "sglang"
    command = [
        sglang_python(),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        f"--confcutdir={folder}",
    ]
    suites = [str(folder / f"{suite}.py") for suite in ("backend", "crossing", "tree")]
    done = subprocess.run([*command, *suites], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
