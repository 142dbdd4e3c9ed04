"""What NVIDIA's management library tells about the GPUs of a PC or server, through ``nvidia-ml-py`` (extra ``nvml``).

A Jetson's library has no power or clocks in it, those are files there (board.py). Whatever a GPU does not support is
left out.
"""

from __future__ import annotations

from typing import Any

from mope_deploy.errors import MissingExtraError
from mope_deploy.extras import require

__all__ = ["Gpu", "gpus"]


class Gpu:
    """One GPU as the library sees it; its number may differ from CUDA's."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        self.name = f"GPU {index}"
        self.model: str = self._ask("nvmlDeviceGetName") or "unknown"
        self.power_limit = self._thousandths("nvmlDeviceGetEnforcedPowerLimit")  # watts

    def celsius(self) -> float | None:
        """Temperature of the chip."""
        return self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)

    def megahertz(self) -> dict[str, float]:
        """Clocks of its processors and of its memory."""
        kinds = {"SM": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        found = {f"{self.name} {kind}": self._ask("nvmlDeviceGetClockInfo", code) for kind, code in kinds.items()}
        return {name: value for name, value in found.items() if value is not None}

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None on GPUs that do not count it (before Volta)."""
        return self._thousandths("nvmlDeviceGetTotalEnergyConsumption")

    def watts(self) -> float | None:
        """What it takes now."""
        return self._thousandths("nvmlDeviceGetPowerUsage")

    def _thousandths(self, function: str) -> float | None:
        value = self._ask(function)
        return None if value is None else value / 1e3

    def _ask(self, function: str, *arguments: int) -> Any:
        """The answer, or None: what a GPU does not support is no error here."""
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


def gpus(nvml: Any = None) -> list[Gpu]:
    """Every GPU of this machine, or of what is given in the package's place; none where that or a driver is missing."""
    try:
        nvml = nvml or require("pynvml", extra="nvml", purpose="reading a GPU's sensors")
    except MissingExtraError:
        return []
    try:
        nvml.nvmlInit()
        return [Gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
