"""docs/regions.md, run as a newcomer would: every command of it, in one shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvstore.testing.servers import free_port

PAGE = Path(__file__).parents[2] / "docs" / "regions.md"

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]


def test_every_command_works() -> None:
    pytest.importorskip("ministack")
    script = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL))
    for port in ("9001", "9002"):
        script = script.replace(port, str(free_port()))
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        done = subprocess.run(
            ["bash", "-c", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\nset -e\n" + script],
            cwd=folder,
            env={**os.environ, "PATH": tools},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for said in (
        "64 blocks in the bucket",
        "128 copied",
        "100% warm",
        "warm enough for traffic",
        "100% warm, done",
        "128 blocks deleted",
    ):
        assert said in done.stdout
