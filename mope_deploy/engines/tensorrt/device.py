"""What this machine is, as far as an engine depends on it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mope_deploy.engines.tensorrt.cuda import Cuda
from mope_deploy.errors import EngineError
from mope_deploy.fields import text

__all__ = ["Device", "available_memory", "read_text", "this_device"]

_Text = Annotated[str, text(500)]


@dataclass(frozen=True)
class Device:
    """A machine. None stands for what is not there or not known."""

    os: _Text  # and processor, "Linux x86_64"
    gpu: _Text | None = None  # its name
    compute_capability: _Text | None = None  # "8.7"
    driver: _Text | None = None  # of the GPU: "580.65.06"
    cuda: _Text | None = None  # the newest that the driver supports: "12.6"
    l4t: _Text | None = None  # release of Jetson Linux: "36.4.3"
    no_gpu: _Text | None = None  # why there is none


def this_device() -> Device:
    """The machine this process runs on, with the first GPU that CUDA shows."""
    system, l4t = f"{platform.system()} {platform.machine()}", _l4t(read_text("/etc/nv_tegra_release"))
    try:
        cuda = Cuda()
    except EngineError as error:
        return Device(os=system, l4t=l4t, no_gpu=str(error))
    return Device(
        os=system,
        gpu=cuda.name,
        compute_capability=cuda.compute_capability,
        driver=_driver(read_text("/proc/driver/nvidia/version")),
        cuda=cuda.version,
        l4t=l4t,
    )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that a new process may take: what Linux says, or less where a container's limit says so."""
    found = []
    match = re.search(r"^MemAvailable:\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    if match:
        found.append(int(match[1]) * 1024)
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        limit, used = (read_text(root / "sys/fs/cgroup" / name) for name in names)  # of version 2, and of version 1
        if limit.isdigit() and used.isdigit():
            stat = read_text((root / "sys/fs/cgroup" / names[0]).with_name("memory.stat"))
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            found.append(max(int(limit) - int(used) + (int(cache[1]) if cache else 0), 0))
    return min(found, default=None)


def _driver(text: str) -> str | None:
    """From the kernel module's own line: ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  …``."""
    match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return match[1] if match else None


def _l4t(text: str) -> str | None:
    """From Jetson Linux's own line: ``# R36 (release), REVISION: 4.3, …``."""
    match = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


def read_text(file: str | Path) -> str:
    """A system file's contents without surrounding space; empty where it is not there, not for us, or off."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""
