"""What the container file copies and installs is the whole product: from those files alone, at the versions of the lock."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "deploy" / "Containerfile").read_text()
IGNORED = (ROOT / "deploy" / "Containerfile.dockerignore").read_text().split("\n")
COPIED = [
    name for line in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE, re.MULTILINE) for name in line.split()[:-1]
]
EXTRAS = re.findall(r"\.\[([\w,]+)\]", CONTAINERFILE)[0].split(",")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel that was built from what is copied."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("src", "wheels", "installed"))
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_of_what_is_copied_has_every_file_of_the_packages(installed: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "kvstore", "connectors", "replication"], cwd=ROOT, capture_output=True, text=True
    )
    kept = [name for name in listed.stdout.split() if not name.endswith("README.md") and (ROOT / name).exists()]
    if not kept:
        pytest.skip("not a git checkout")
    assert [name for name in kept if not (installed / name).is_file()] == []


def test_its_command_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import kvstore; from importlib.metadata import entry_points\n"
        "(script,) = entry_points(group='console_scripts', name='kvstore')\n"
        "print(kvstore.__file__); sys.argv[0] = 'kvstore'; script.load()()"
    )
    words = ["region", "--help"]  # of another package, which the entry points bring in
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "run" in done.stdout


def test_every_package_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    locked = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {_name(one) for one in wanted} - locked == set()
    assert "--constraint constraints.txt" in CONTAINERFILE


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    assert IGNORED[1] == "*"
    assert {line[1:] for line in IGNORED if line.startswith("!")} == set(COPIED)


def test_it_runs_as_a_user_that_is_not_root() -> None:
    last = CONTAINERFILE.rpartition("\nFROM")[2]
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert "--uid 10001" in last


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")
