"""The installed commands beside a user's own files of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device.test_console import entry


@pytest.mark.parametrize(("command", "package"), [("mope_train", "train"), ("mope_export", "export")])
def test_a_users_file_of_our_name_is_named_and_not_run(command: str, package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise SystemError('run')\n", encoding="utf-8")
    found = entry(command, path=tmp_path)
    assert found.returncode == 2
    assert str(tmp_path / f"{package}.py") in found.stderr
    assert found.stderr.count("\n") == 1
