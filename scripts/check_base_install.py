"""Whether the base install resolves for the devices it is for: wheels alone, Python 3.10 and 3.12, aarch64 and x86_64.

    python scripts/check_base_install.py

Asks pip, which downloads no more than it needs to know (a few seconds each). pip applies conditions such as
``python_version < "3.11"`` of the Python it runs on, not of the one asked about: they are applied here, until nothing
new turns up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.12")  # JetPack 6, JetPack 7
MACHINES = ("aarch64", "x86_64")
# Up to the C library of Ubuntu 22.04, which JetPack 6 stands on.
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28", "manylinux_2_31", "manylinux_2_34")
# What a device has of its own, or must not have: nothing of the base install may bring it.
UNWANTED = ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "tensorrt", "tensorrt-rtx", "transformers", "timm")


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for python in PYTHONS:
        for machine in MACHINES:
            try:
                found = resolve(project["dependencies"], python, machine)
            except LookupError as error:
                print(f"error: the base install does not resolve for Python {python} on {machine}: {error}")
                return 1
            if brought := sorted(set(UNWANTED) & set(found)):
                print(f"error: the base install brings {', '.join(brought)} on Python {python}, {machine}")
                return 1
            print(f"base install, Python {python}, {machine}: {len(found)} wheels, numpy {found['numpy']}")
    return 0


def resolve(dependencies: Sequence[str], python: str, machine: str) -> dict[str, str]:
    """Name → version of all that the dependencies bring.

    Raises:
        LookupError: what pip says.
    """
    wanted = list(dependencies)
    while True:
        report = ask_pip(wanted, python, machine)
        found = {
            str(canonicalize_name(one["metadata"]["name"])): one["metadata"]["version"] for one in report["install"]
        }
        missing = left_out(report, python, machine, set(found))
        if not missing:
            return found
        wanted += missing


def left_out(report: dict[str, Any], python: str, machine: str, found: set[str]) -> list[str]:
    """Requirements that hold on the device and that pip, on this Python, did not count."""
    device = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    missing = []
    for one in report["install"]:
        for text in one["metadata"].get("requires_dist", ()):
            need = Requirement(text)
            if need.marker and need.marker.evaluate(device) and canonicalize_name(need.name) not in found:
                need.marker = None
                missing.append(str(need))
    return sorted(set(missing))


def ask_pip(wanted: Sequence[str], python: str, machine: str) -> dict[str, Any]:
    """pip's report on installing ``wanted`` into an empty folder of another machine, without installing anything."""
    platforms = [option for name in PLATFORMS for option in ("--platform", f"{name}_{machine}")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check"]
        command += ["--ignore-installed", "--only-binary=:all:", "--target", str(Path(folder, "empty"))]
        command += ["--implementation", "cp", "--python-version", python, *platforms, "--report", str(report), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise LookupError("; ".join(line.removeprefix("ERROR: ") for line in said) or f"pip said {done.stderr!r}")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


if __name__ == "__main__":
    sys.exit(main())
