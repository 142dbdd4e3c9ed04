"""What a board tells about itself: temperatures, clocks, power, energy, power mode, memory. Files of Linux, and NVML.

Nothing here needs a right beyond reading, and nothing is required: what a machine does not report is absent.

| figure | where it is read |
|---|---|
| temperature | ``/sys/class/thermal/thermal_zone*``, NVML |
| clocks | ``/sys/devices/system/cpu/cpufreq/policy*``, ``/sys/class/devfreq/*gpu*`` (Jetson's GPU), NVML |
| energy | ``/sys/class/powercap/intel-rapl:*`` (Intel and AMD; readable by root alone on most systems), NVML |
| power | ``/sys/class/hwmon``: INA3221 rails of a Jetson, and whatever else reports watts; NVML |
| power mode | ``/var/lib/nvpmodel/status``, ``/etc/nvpmodel.conf`` (Jetson); ``/sys/firmware/acpi/platform_profile`` |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope_deploy.bench.nvml import Gpu, gpus
from mope_deploy.engines.tensorrt.device import read_text

__all__ = ["Board", "Reading", "peak_memory", "resident_memory"]

_GPU_CLOCKS = re.compile(r"gpu|ga10b|gv11b|gp10b")  # names of a Jetson's GPU among its devices of variable clock
_MODELS = ("proc/device-tree/model", "sys/class/dmi/id/product_name")  # a development board's own name, a PC's
_PLAUSIBLE = (-40.0, 150.0)  # °C; a sensor that is switched off reports nonsense


@dataclass(frozen=True)
class Reading:
    """Everything that changes, at one moment, each by the name that the board gives it."""

    celsius: dict[str, float]
    megahertz: dict[str, float]
    joules: dict[str, float]  # counters, since an unknown moment
    watts: dict[str, float]  # where there is no counter


class Board:
    """This machine's sensors: files below ``root``, and its GPUs as NVML shows them, unless they are given."""

    def __init__(self, root: Path = Path("/"), *, gpus_here: Sequence[Gpu] | None = None) -> None:
        self._root = root
        self._gpus = gpus() if gpus_here is None else list(gpus_here)
        counters = dict(self._energy_counters())  # name → (file, joules at which it starts anew)
        self.unreadable = [name for name, (file, _) in counters.items() if _scaled(file, 1) is None]
        self._counters = {name: found for name, found in counters.items() if name not in self.unreadable}

    def describe(self) -> dict[str, Any]:
        """What does not change while it runs, JSON-ready; None for what is not reported."""
        governors = {read_text(policy / "scaling_governor") for policy in self._policies()} - {""}
        cpu = re.search(r"^model name\s*:\s*(.+)$", read_text(self._root / "proc/cpuinfo"), re.MULTILINE)
        board, computer = (read_text(self._root / file).strip("\0") for file in _MODELS)
        return {
            "model": board or computer or None,
            "cpu": cpu[1].strip() if cpu else None,
            "gpus": [{"name": gpu.name, "model": gpu.model, "power_limit_w": gpu.power_limit} for gpu in self._gpus],
            "governor": ", ".join(sorted(governors)) or None,
            "power_mode": self._power_mode(),
        }

    def read(self) -> Reading:
        """All sensors now."""
        clocks = {f"CPU {policy.name}": _scaled(policy / "scaling_cur_freq", 1e-3) for policy in self._policies()}
        for device in self._each("sys/class/devfreq/*"):
            if _GPU_CLOCKS.search(device.name):
                clocks[device.name] = _scaled(device / "cur_freq", 1e-6)
        heat: dict[str, float | None] = {}
        for zone in self._each("sys/class/thermal/thermal_zone*"):
            heat[_unique(read_text(zone / "type") or zone.name, heat)] = _scaled(zone / "temp", 1e-3)
        joules = {name: _scaled(file, 1e-6) for name, (file, _) in self._counters.items()}
        for gpu in self._gpus:
            heat[gpu.name], joules[gpu.name] = gpu.celsius(), gpu.joules()
            clocks.update(gpu.megahertz())
        return Reading(
            celsius={k: v for k, v in _known(heat).items() if _PLAUSIBLE[0] < v < _PLAUSIBLE[1]},
            megahertz=_known(clocks),
            joules=_known(joules),
            watts=self.watts(),
        )

    def watts(self) -> dict[str, float]:
        """Power now, of what has no energy counter."""
        found: dict[str, float | None] = {}
        for monitor in self._each("sys/class/hwmon/hwmon*"):
            for file in _sorted(monitor.glob("power[0-9]*_input"), monitor.glob("power[0-9]*_average")):
                found[_unique(_label(monitor, file.name.partition("_")[0]), found)] = _scaled(file, 1e-6)  # from µW
            if read_text(monitor / "name").startswith("ina3221"):
                for current in _sorted(monitor.glob("curr[1-3]_input")):
                    rail = current.name[len("curr")]
                    volts, amperes = _scaled(monitor / f"in{rail}_input", 1e-3), _scaled(current, 1e-3)
                    if volts is not None and amperes is not None:
                        found[_unique(_label(monitor, f"in{rail}"), found)] = volts * amperes
        for gpu in self._gpus:
            if gpu.joules() is None:
                found[gpu.name] = gpu.watts()
        return _known(found)

    def joules_between(self, before: Reading, after: Reading) -> dict[str, float]:
        """What each energy counter counted; one that started anew in between is taken to have done so once."""
        found = {}
        for name in before.joules.keys() & after.joules.keys():
            spent = after.joules[name] - before.joules[name]
            if spent < 0:
                spent += self._counters[name][1] if name in self._counters else 0.0
            found[name] = spent
        return dict(sorted(found.items()))

    def _energy_counters(self) -> Iterator[tuple[str, tuple[Path, float]]]:
        """Processor packages, whole platforms, memory beside a package; parts of a package would count twice."""
        for zone in self._each("sys/class/powercap/intel-rapl:*"):
            depth, name = zone.name.count(":"), read_text(zone / "name")
            if not (depth == 1 or (depth == 2 and name == "dram")):
                continue
            owner = "" if depth == 1 else f"{read_text(zone.parent / zone.name.rpartition(':')[0] / 'name')} "
            restart = _scaled(zone / "max_energy_range_uj", 1e-6) or 0.0
            yield f"{owner}{name or zone.name}", (zone / "energy_uj", restart)

    def _policies(self) -> list[Path]:
        return self._each("sys/devices/system/cpu/cpufreq/policy*")

    def _power_mode(self) -> str | None:
        """Jetson's power mode by name and number, or a PC's platform profile."""
        if match := re.search(r"pmode:(\d+)", read_text(self._root / "var/lib/nvpmodel/status")):
            number = int(match[1])
            models = read_text(self._root / "etc/nvpmodel.conf")
            named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+?)\s*>", models)
            return f"{named[1]} ({number})" if named else str(number)
        return read_text(self._root / "sys/firmware/acpi/platform_profile") or None

    def _each(self, pattern: str) -> list[Path]:
        return _sorted(self._root.glob(pattern))


def resident_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process has now."""
    return _status(root, "VmRSS")


def peak_memory(root: Path = Path("/")) -> int | None:
    """Most bytes of main memory that this process ever had; its parent's do not count, as they do in getrusage."""
    return _status(root, "VmHWM")


def _status(root: Path, key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB", read_text(root / "proc/self/status"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _label(monitor: Path, stem: str) -> str:
    """The name of one channel of a monitor."""
    return read_text(monitor / f"{stem}_label") or f"{read_text(monitor / 'name') or monitor.name} {stem}"


def _unique(name: str, taken: dict[str, Any]) -> str:
    """Several sensors may bear one name (``acpitz``)."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found


def _sorted(*found: Iterator[Path]) -> list[Path]:
    """By name, numbers by their value."""
    paths = {path for paths in found for path in paths}
    return sorted(paths, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])


def _known(found: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in found.items() if value is not None}


def _scaled(file: Path, factor: float) -> float | None:
    try:
        return float(read_text(file)) * factor
    except ValueError:
        return None
