"""What an install brings: no extra replaces an onnxruntime-gpu, and the check of the base install finds what it is for.

The check itself asks an index and is run by ``make test`` when its environment is new; here pip's answers are made up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_base_install", ROOT / "scripts/check_base_install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one(name: str, *needs: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(needs)}}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def test_onnxruntime_comes_by_its_own_extras_alone() -> None:
    """One that came with another extra would be installed over a device's own onnxruntime-gpu."""
    holders = {key for key, needs in PROJECT["optional-dependencies"].items() if any("onnxruntime" in n for n in needs)}
    assert holders == {"ort", "ort-gpu"}
    assert names(PROJECT["dependencies"]) == {"numpy", "pillow", "tokenizers", "typer", "rich", "msgspec"}


def test_what_pip_leaves_out_for_another_python_is_asked_for(check: ModuleType) -> None:
    report = {
        "install": [
            one("Any_IO", 'exceptiongroup>=1.0.2; python_version < "3.11"', "idna>=2.8", 'uv; extra == "speed"'),
            one("rich", 'typing-extensions>=4; python_version < "3.11"', 'colorama; sys_platform == "win32"'),
        ]
    }
    found = {"any-io", "rich", "idna", "typing-extensions"}
    assert check.left_out(report, "3.10", "aarch64", found) == ["exceptiongroup>=1.0.2"]
    assert check.left_out(report, "3.12", "aarch64", found) == []


def test_asks_until_nothing_is_left_out(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask_pip(wanted: list[str], python: str, machine: str) -> dict[str, Any]:
        asked.append(list(wanted))
        later = [one("exceptiongroup")] if "exceptiongroup" in wanted else []
        return {"install": [one("anyio", 'exceptiongroup; python_version < "3.11"'), *later]}

    monkeypatch.setattr(check, "ask_pip", ask_pip)
    assert check.resolve(["anyio"], "3.10", "aarch64") == {"anyio": "1.0", "exceptiongroup": "1.0"}
    assert asked == [["anyio"], ["anyio", "exceptiongroup"]]


def test_says_what_does_not_resolve(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask_pip(wanted: list[str], python: str, machine: str) -> dict[str, Any]:
        if (python, machine) == ("3.10", "aarch64"):
            raise LookupError("No matching distribution found for numpy>=9")
        return {"install": [one("numpy")]}

    monkeypatch.setattr(check, "ask_pip", ask_pip)
    assert check.main() == 1
    assert "for Python 3.10 on aarch64: No matching distribution found for numpy>=9" in capsys.readouterr().out


def test_refuses_what_a_device_has_of_its_own(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"install": [one("numpy"), one("rich")]}
    monkeypatch.setattr(check, "ask_pip", lambda *_: answer)
    assert check.main() == 0
    assert capsys.readouterr().out.count("base install, Python") == 4
    answer["install"].append(one("onnxruntime"))
    assert check.main() == 1
    assert "the base install brings onnxruntime" in capsys.readouterr().out
