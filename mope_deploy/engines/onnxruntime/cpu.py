"""How a session on the CPU is set up: its threads and its memory arena, decided here and nowhere else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mope_deploy.arguments import check_flag, check_integer
from mope_deploy.engines.tensorrt.device import read_text
from mope_deploy.limits import MAX_THREADS
from mope_deploy.manifest import Cpu

__all__ = ["CpuSettings", "cpu_settings", "usable_cores"]


@dataclass(frozen=True)
class CpuSettings:
    """What a session is opened with, and records."""

    threads: int  # of one operator
    threads_from: str  # who said so: "asked for", "the bundle" or "the cores of this process"
    arena: bool  # whether memory of earlier runs is kept for the next one, which else asks the system again
    spinning: bool  # whether idle threads spin: faster alone, slower beside other work

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, arena {'on' if self.arena else 'off'}"


def cpu_settings(
    bundle: Cpu | None = None, *, threads: int | None = None, arena: bool | None = None, spinning: bool = True
) -> CpuSettings:
    """What was asked for, else what the bundle says, else as many threads as this process may use cores.

    Args:
        bundle: ``build.cpu`` of the manifest.
        threads, arena: asked for on this device; None for no wish.
        spinning: see :class:`CpuSettings`.

    Raises:
        UsageError: ``threads`` is no integer from 1 to 512, or ``arena`` no bool.
    """
    bundle = bundle or Cpu()
    arena = bundle.arena if arena is None else check_flag("arena", arena)
    if threads is not None:
        count, said_by = check_integer("threads", threads, 1, MAX_THREADS), "asked for"
    elif bundle.threads is not None:
        count, said_by = bundle.threads, "the bundle"
    else:
        count, said_by = usable_cores(), "the cores of this process"
    return CpuSettings(count, said_by, arena, spinning)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, hardware threads of one core once; its cgroup's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    threads = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed)
    cores = len({read_text(file) or file for file in threads})  # all threads of one core tell the same list of them
    quota = min(_quotas(root), default=math.inf)
    return max(1, min(cores, math.ceil(quota) if math.isfinite(quota) else cores))


def _quotas(root: Path) -> Iterator[float]:
    """CPU time per time that this process's cgroups allow, each from its own group up; version 2 and version 1."""
    base = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            for folder in _upwards(base, group):
                yield from _share(*(read_text(folder / "cpu.max").split() or ["max"]))
        elif "cpu" in controllers.split(","):
            # Systems call the folder by its controllers; "cpu" is a link to it that some containers lack.
            hierarchy = next((path for path in (base / "cpu", base / controllers) if path.is_dir()), base)
            for folder in _upwards(hierarchy, group):
                yield from _share(read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))


def _upwards(base: Path, group: str) -> Iterator[Path]:
    """The folder of a cgroup and those above it. Inside a container ``base`` may be the group itself."""
    parts = [part for part in group.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:count])


def _share(quota: str, period: str = "") -> Iterator[float]:
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # "max" and -1 are no limit
        yield int(quota) / int(period)
