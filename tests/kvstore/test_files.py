"""Small files that are replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.files import check_private, replace_file, replace_private


def test_what_cannot_be_written_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for replace in (replace_file, replace_private):
        path = tmp_path / f"{replace.__name__}.json"
        replace(path, b"old")
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", full)
            with pytest.raises(OSError, match="full"):
                replace(path, b"new")
        assert path.read_bytes() == b"old"
        replace(path, b"newer")
        assert path.read_bytes() == b"newer"


def full(source: Path, target: Path) -> None:
    raise OSError("the disk is full")


def test_a_secret_is_its_users_alone_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    replace_private(path, b"secret")
    assert path.stat().st_mode & 0o777 == 0o600
    check_private(path, path.stat(), "api.tokens", 6)
    with pytest.raises(ConfigError, match=r"api\.tokens.*6 bytes"):
        check_private(path, path.stat(), "api.tokens", 5)
    for mode in (0o604, 0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=r"api\.tokens.*chmod 600"):
            check_private(path, path.stat(), "api.tokens", 6)
