"""What a figure was measured on; every benchmark writes it beside its figures."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from mope_deploy.bench.board import Board
from mope_deploy.extras import installed_versions

__all__ = ["describe_machine", "int8_instructions"]

_PACKAGES = ("torch", "onnxruntime", "numpy", "onnx", "onnxscript", "timm", "transformers")
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")  # the kernel's names, of x86 and of Arm


def describe_machine() -> dict[str, object]:
    """CPU model, usable cores, memory, Python and the packages that compute, JSON-ready; None for what is not known."""
    board = Board().describe()
    return {
        "cpu": board["cpu"] or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "int8_instructions": int8_instructions(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "board": board["model"],
        "governor": board["governor"],
        "power_mode": board["power_mode"],
        "gpus": [gpu["model"] for gpu in board["gpus"]],
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed_versions(_PACKAGES),
    }


def int8_instructions() -> list[str]:
    """Which of the CPU's instructions multiply and add 8-bit integers."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return [name for name in _INT8 if flags and name in flags[1].split()]
