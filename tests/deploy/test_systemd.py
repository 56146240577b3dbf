"""systemd takes the units and their drop-ins, they are confined, and name folders that the service may write to."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvstore.config import load

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
MOST_EXPOSED = 40
"""Of 100, by systemd's own count."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


@needs_systemd
@each_unit
def test_systemd_takes_it(unit: Path) -> None:
    done = analyze("verify", "--man=no", str(unit))
    complaints = [line for line in done.stderr.splitlines() if "kvstore" in line and "is not executable" not in line]
    assert complaints == []


@needs_systemd
@each_unit
def test_it_is_confined(unit: Path) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", "--no-pager", str(unit))
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd does not judge files")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


@each_unit
def test_what_it_sets_is_accepted_and_lies_where_it_may_write(unit: Path) -> None:
    text = unit.read_text()
    environ = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
    config = load(None, [], environ={name: value for name, value in environ.items() if "__" in name}).config
    assert config.node.directory == Path("/var/lib/kvstore")
    assert re.search("^StateDirectory=kvstore$", text, re.MULTILINE)
    assert config.node.socket.parent == Path("/run/kvstore") or "region" in unit.name
