"""SECURITY.md names tests: they exist, and every threat has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_test_it_names_exists() -> None:
    assert len(NAMED) > 20
    for file, name in NAMED:
        tree = ast.parse((ROOT / file).read_text())
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{file} has no {name}"


def test_every_threat_has_a_test() -> None:
    threats = PAGE.partition("## Threats")[2].partition("\n## ")[0].split("\n### ")[1:]
    assert len(threats) > 8
    for threat in threats:
        assert re.search(r"Tests: `tests/", threat), threat.splitlines()[0]
