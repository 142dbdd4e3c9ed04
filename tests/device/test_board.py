"""What a board tells, on made-up file trees, and the energy of a stretch of work."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bench.board import Board, Reading, peak_memory, resident_memory
from mope_deploy.bench.energy import EnergyMeter
from mope_deploy.bench.nvml import gpus
from tests.device.sensors import NOWHERE, Steady, bare_board, lay

pytestmark = pytest.mark.device

JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone10/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone10/temp": "50000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1510400\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "4960\n",
    "sys/class/hwmon/hwmon1/curr2_input": "250\n",
    "sys/class/hwmon/hwmon1/curr3_input": "10\n",
}
RAPL = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Imaginary CPU 9000\n",
    "sys/firmware/acpi/platform_profile": "balanced\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "9000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "5000000\n",
    "sys/class/powercap/intel-rapl:0:1/name": "dram\n",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": "250000\n",
    "sys/class/powercap/intel-rapl:0:1/max_energy_range_uj": "10000000\n",
    "sys/class/powercap/intel-rapl-mmio:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl-mmio:0/energy_uj": "9000000\n",
    "sys/class/hwmon/hwmon0/name": "amdgpu\n",
    "sys/class/hwmon/hwmon0/power1_average": "31000000\n",
}


def test_a_jetson(tmp_path: Path) -> None:
    board = Board(lay(tmp_path, JETSON), gpus_here=[])
    described = board.describe()
    assert described["model"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (described["power_mode"], described["governor"]) == ("MAXN_SUPER (2)", "schedutil")
    state = board.read()
    assert state.celsius == {"cpu-thermal": 48.5, "cpu-thermal 2": 50.0}  # and nothing of the sensor that is off
    assert state.megahertz == pytest.approx({"CPU policy0": 1510.4, "CPU policy4": 729.6, "17000000.gpu": 624.75})
    assert state.watts == pytest.approx({"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.24})  # the third rail has no voltage
    assert state.joules == {}


def test_power_mode_without_its_names(tmp_path: Path) -> None:
    board = Board(lay(tmp_path, {"var/lib/nvpmodel/status": "pmode:0012"}), gpus_here=[])
    assert board.describe()["power_mode"] == "12"


def test_a_pc(tmp_path: Path) -> None:
    root = lay(tmp_path, RAPL)
    board = Board(root, gpus_here=[])
    assert (board.describe()["cpu"], board.describe()["power_mode"]) == ("Imaginary CPU 9000", "balanced")
    before = board.read()
    assert before.joules == {"package-0": 9.0, "package-0 dram": 0.25}  # cores are in the package, mmio is it again
    assert before.watts == {"amdgpu power1": 31.0}
    lay(root, {f"sys/class/powercap/{zone}/energy_uj": "750000\n" for zone in ("intel-rapl:0", "intel-rapl:0:1")})
    spent = board.joules_between(before, board.read())
    assert spent == pytest.approx({"package-0": 1.75, "package-0 dram": 0.5})  # the first began anew at 10 J


def test_counters_that_cannot_be_read_are_not_reported(tmp_path: Path) -> None:
    root = lay(tmp_path, {name: text for name, text in RAPL.items() if not name.endswith("rapl:0/energy_uj")})
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").mkdir()  # reading it fails, for root too
    board = Board(root, gpus_here=[])
    assert board.unreadable == ["package-0"]
    assert board.read().joules == {"package-0 dram": 0.25}


def test_a_machine_without_any_sensor() -> None:
    board = bare_board()
    assert board.read() == Reading({}, {}, {}, {})
    described = board.describe()
    assert described.pop("gpus") == []
    assert set(described.values()) == {None}
    assert resident_memory(NOWHERE) is None


def test_memory_of_this_process(tmp_path: Path) -> None:
    root = lay(tmp_path, {"proc/self/status": "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t    1024 kB\n"})
    assert (peak_memory(root), resident_memory(root)) == (2 * 2**20, 2**20)
    here, most = resident_memory(), peak_memory()
    assert here is not None
    assert most is not None
    assert 2**20 < here <= most


def test_energy_is_counted_or_integrated() -> None:
    with EnergyMeter(Steady()) as meter:
        time.sleep(0.12)
    assert meter.joules["package-0"] == 2.0
    assert meter.joules["VDD_IN"] / meter.seconds == pytest.approx(6.0)


class Nvml:
    """A library with one GPU; ``without`` are functions that the GPU does not support."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, *without: str) -> None:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetName": lambda handle: "NVIDIA Imaginary",
            "nvmlDeviceGetTemperature": lambda handle, sensor: {0: 37}[sensor],
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetPowerUsage": lambda handle: 71_500,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345_678,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        }
        for name, answer in answers.items():
            setattr(self, name, self.refuse if name in without else answer)

    def refuse(self, *_: Any) -> None:
        raise self.NVMLError("Not Supported")


def test_gpus_by_nvml() -> None:
    (gpu,) = gpus(Nvml())
    assert (gpu.name, gpu.model, gpu.power_limit) == ("GPU 0", "NVIDIA Imaginary", 700.0)
    state = Board(NOWHERE, gpus_here=[gpu]).read()
    assert state.celsius == {"GPU 0": 37.0}
    assert state.megahertz == {"GPU 0 SM": 1980.0, "GPU 0 memory": 2619.0}
    assert state.joules == {"GPU 0": 12345.678}
    assert state.watts == {}  # its counter is better
    (old,) = gpus(Nvml("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetClockInfo"))
    state = Board(NOWHERE, gpus_here=[old]).read()
    assert (state.watts, state.joules, state.megahertz) == ({"GPU 0": 71.5}, {}, {})
    assert gpus(Nvml("nvmlInit")) == []


def test_no_package_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == []


def test_the_package_has_what_is_asked_of_it() -> None:
    """A misspelt name would only be found on a machine with a GPU."""
    import pynvml

    assert [name for name in vars(Nvml()) if not hasattr(pynvml, name)] == []
    assert (pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (0, 1, 2)
