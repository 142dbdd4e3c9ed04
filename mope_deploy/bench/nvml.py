"""What NVIDIA's management library tells about the GPUs of a PC or server, read-only and through ctypes.

The library comes with the driver; a Jetson's has no power or clocks in it, those are files there (board.py). Whatever a
GPU does not support is left out.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

__all__ = ["Gpu", "gpus"]

_LIBRARY = "libnvidia-ml.so.1"
_TEMPERATURE_GPU, _CLOCK_SM, _CLOCK_MEMORY = 0, 1, 2  # nvmlTemperatureSensors_t, nvmlClockType_t
_FUNCTIONS = {
    "nvmlInit_v2": (),
    "nvmlDeviceGetCount_v2": (POINTER(c_uint),),
    "nvmlDeviceGetHandleByIndex_v2": (c_uint, POINTER(c_void_p)),
    "nvmlDeviceGetName": (c_void_p, c_char_p, c_uint),
    "nvmlDeviceGetTemperature": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetPowerUsage": (c_void_p, POINTER(c_uint)),
    "nvmlDeviceGetTotalEnergyConsumption": (c_void_p, POINTER(c_ulonglong)),
    "nvmlDeviceGetEnforcedPowerLimit": (c_void_p, POINTER(c_uint)),
}


class Gpu:
    """One GPU as the library sees it; its number may differ from CUDA's.

    Attributes:
        name: ``"GPU 0"``, for its figures.
        model: what it is.
        power_limit: watts that it may take, or None.
    """

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        self._handle = c_void_p()
        _call(library, "nvmlDeviceGetHandleByIndex_v2", index, byref(self._handle))
        model = ctypes.create_string_buffer(96)
        known = _call(library, "nvmlDeviceGetName", self._handle, model, len(model))
        self.name = f"GPU {index}"
        self.model = model.value.decode(errors="replace") if known else "unknown"
        limit = self._uint("nvmlDeviceGetEnforcedPowerLimit")
        self.power_limit = None if limit is None else limit / 1e3

    def celsius(self) -> float | None:
        """Temperature of the chip."""
        return self._uint("nvmlDeviceGetTemperature", _TEMPERATURE_GPU)

    def megahertz(self) -> dict[str, float]:
        """Clocks of its processors and of its memory."""
        found = {
            f"{self.name} SM": self._uint("nvmlDeviceGetClockInfo", _CLOCK_SM),
            f"{self.name} memory": self._uint("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
        }
        return {name: value for name, value in found.items() if value is not None}

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None on GPUs that do not count it (before Volta)."""
        value = c_ulonglong()
        known = _call(self._library, "nvmlDeviceGetTotalEnergyConsumption", self._handle, byref(value))
        return value.value / 1e3 if known else None

    def watts(self) -> float | None:
        """What it takes now."""
        milliwatts = self._uint("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def _uint(self, function: str, *arguments: int) -> float | None:
        value = c_uint()
        return float(value.value) if _call(self._library, function, self._handle, *arguments, byref(value)) else None


def gpus(library: Any = None) -> list[Gpu]:
    """Every GPU of this machine; none where the library or a GPU is missing.

    Args:
        library: what answers instead of the driver's own library.
    """
    try:
        library = library or ctypes.CDLL(_LIBRARY)
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError):
        return []
    count = c_uint()
    if not _call(library, "nvmlInit_v2") or not _call(library, "nvmlDeviceGetCount_v2", byref(count)):
        return []
    return [Gpu(library, index) for index in range(count.value)]


def _call(library: Any, function: str, *arguments: Any) -> bool:
    """Whether it succeeded; what a GPU does not support is no error here."""
    return getattr(library, function)(*arguments) == 0
