"""The part of the CUDA driver API that an engine needs, through ctypes: no pycuda, no cupy, no CUDA toolkit.

The driver's library (``libcuda.so.1``) is on every machine with a GPU driver under that one name, and its interface is
kept from release to release; the runtime's (``libcudart.so.12``, ``.13``) may be anywhere or linked into TensorRT. Both
work on the same primary context, which is what makes addresses from here good for TensorRT.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from numpy.typing import NDArray

from mope_deploy.errors import EngineError

__all__ = ["Cuda"]

_LIBRARY = "libcuda.so.1"
_CC_MAJOR, _CC_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_FUNCTIONS = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


class Cuda:
    """The first GPU that CUDA shows (``CUDA_VISIBLE_DEVICES`` chooses), without a context until one is needed.

    Raises:
        EngineError: no driver, or no GPU; the message has the driver's own words.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
            for symbol, arguments in _FUNCTIONS.items():
                function = getattr(self._library, symbol)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            raise EngineError(f"no CUDA driver here ({error})") from error
        self._call("cuInit", 0)
        if self._int("cuDeviceGetCount") < 1:
            raise EngineError("CUDA shows no GPU (look at CUDA_VISIBLE_DEVICES)")
        self._device, version = self._int("cuDeviceGet", 0), self._int("cuDriverGetVersion")
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._device)
        major, minor = (self._int("cuDeviceGetAttribute", what, self._device) for what in (_CC_MAJOR, _CC_MINOR))
        self._context = c_void_p()
        self.name = name.value.decode(errors="replace")
        self.compute_capability = f"{major}.{minor}"  # "8.6"
        self.version = f"{version // 1000}.{version % 1000 // 10}"  # of CUDA, as far as the driver supports it: "12.6"

    def activate(self) -> None:
        """Make the GPU's primary context current in this thread; kept until the process ends, as TensorRT uses it."""
        if not self._context:
            self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        """Handle of a new stream, which lives as long as the process."""
        handle = c_void_p()
        self._call("cuStreamCreate", byref(handle), _NON_BLOCKING)
        assert handle.value is not None
        return handle.value

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes (at least one) on the GPU; :meth:`free` gives them back."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), max(size, 1))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a C-contiguous array to the GPU; ``array`` must live until :meth:`wait`."""
        assert array.flags.c_contiguous
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Fill a C-contiguous array from the GPU; its values are there after :meth:`wait`."""
        assert array.flags.c_contiguous
        assert array.flags.writeable
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def wait(self, stream: int) -> None:
        """Return when everything put on ``stream`` is done; errors of earlier calls may surface here."""
        self._call("cuStreamSynchronize", stream)

    def _int(self, name: str, *arguments: Any) -> int:
        value = c_int()
        self._call(name, byref(value), *arguments)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return
        text = c_char_p()
        self._library.cuGetErrorString(code, byref(text))
        reason = text.value.decode(errors="replace") if text.value else "unknown error"
        raise EngineError(f"CUDA: {name} failed with error {code}, {reason}")
