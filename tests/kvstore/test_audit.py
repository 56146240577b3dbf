"""The audit log."""

from __future__ import annotations

import json
from pathlib import Path

from kvstore.audit import STRANGERS_PER_SECOND, AuditLog


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_strangers_do_not_fill_the_disk_and_hide_nobody(tmp_path: Path) -> None:
    now = 100.0
    log = AuditLog(tmp_path / "a", lambda: now)
    for _ in range(1000):
        log.write({"who": None}, known=False)
    log.write({"who": "root"}, known=True)
    now = 101.0
    log.write({"who": None}, known=False)
    found = lines(tmp_path / "a")
    assert [line["who"] for line in found] == [None] * STRANGERS_PER_SECOND + ["root", None]
    assert [line["left_out"] for line in found if "left_out" in line] == [1000 - STRANGERS_PER_SECOND]


def test_it_is_its_owners_alone_and_never_in_the_way(tmp_path: Path) -> None:
    AuditLog(tmp_path / "a").write({"who": "root"}, known=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    AuditLog(tmp_path / "missing" / "a").write({"who": "root"}, known=True)
