"""The three TensorRT libraries behind one name each: which are installed, and which of them is used.

They share one Python API: ``tensorrt`` 10.x (Jetson, servers), ``tensorrt`` 11.x (servers) and ``tensorrt_rtx`` (RTX
PCs and workstations). What differs between them is asked of the library itself, never inferred from its version.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mope_deploy.errors import EngineError, MissingExtraError, UsageError
from mope_deploy.fields import did_you_mean
from mope_deploy.files import reason

__all__ = ["BACKENDS", "Backend", "choose_backend", "dtype_name", "installed", "is_installed", "open_backend"]

BACKENDS = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}  # module → the extra that installs it
OLDEST = {"tensorrt": 10, "tensorrt_rtx": 1}  # major version; before 10, networks cannot be strongly typed

# TensorRT's names that are not numpy's in capitals.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8", "FP4": "float4"}


@dataclass(frozen=True)
class Backend:
    """An imported TensorRT library."""

    name: str  # of its module, one of BACKENDS
    version: str  # all of it: "10.3.0", "1.7.1.116"
    module: ModuleType

    @property
    def needs_gpu(self) -> bool:
        """Whether it builds only on the GPU it builds for; TensorRT-RTX also builds for GPUs that are not here."""
        return self.name != "tensorrt_rtx"

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What it can be told to build for, ``("7.5", "8.0", …)``; empty if it only builds for the GPU at hand."""
        known = getattr(self.module, "ComputeCapability", None)
        digits = [name[2:] for name in dir(known) if name.startswith("SM") and name[2:].isdigit()]
        return tuple(f"{d[:-1]}.{d[-1]}" for d in sorted(digits, key=int))


def open_backend(name: str) -> Backend:
    """Import the library called ``name``.

    Raises:
        UsageError: there is no such library.
        MissingExtraError: it is not installed.
        EngineError: it is installed and cannot be imported, or it is too old.
    """
    if name not in BACKENDS:
        raise UsageError(
            "backend",
            received=repr(name),
            expected=" or ".join(BACKENDS),
            todo=did_you_mean(name, BACKENDS),
        )
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a wheel for another CUDA or Python stumbles over its own libraries
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingExtraError(f"{name} is not installed", todo=_how_to_get(name)) from error
        what = f"{name} is installed and cannot be imported: {reason(error)}"
        raise EngineError(what, todo="install it again") from error
    version = str(getattr(module, "__version__", ""))
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST[name]:
        raise EngineError(f"{name} is too old", received=version or "no version", expected=f"{OLDEST[name]} or newer")
    return Backend(name, version, module)


def installed() -> dict[str, Backend | str]:
    """Every library that is installed: the library, or the reason it cannot be used."""
    found: dict[str, Backend | str] = {}
    for name in filter(is_installed, BACKENDS):
        try:
            found[name] = open_backend(name)
        except (EngineError, MissingExtraError) as error:
            found[name] = str(error)
    return found


def is_installed(name: str) -> bool:
    """Whether the library's module can be found; it may still fail to be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # blocked, or replaced by something that is no module
        return False


def choose_backend(name: str | None = None, *, gpu: bool) -> Backend:
    """The library to build with: the one asked for, or the one that fits this machine.

    Args:
        name: of :data:`BACKENDS`; None to choose: ``tensorrt`` where there is a GPU, ``tensorrt_rtx`` where there is
            none (``tensorrt`` itself cannot build there), else whichever is installed.
        gpu: whether this machine has one.

    Raises:
        UsageError, MissingExtraError, EngineError: see :func:`open_backend`.
    """
    if name is not None:
        return open_backend(name)
    found = installed()
    usable = {key: backend for key, backend in found.items() if isinstance(backend, Backend)}
    for wanted in ("tensorrt", "tensorrt_rtx") if gpu else ("tensorrt_rtx", "tensorrt"):
        if wanted in usable:
            return usable[wanted]
    if found:
        raise EngineError("; ".join(str(reason) for reason in found.values()))
    raise MissingExtraError(
        "building an engine needs TensorRT, and none is installed",
        todo=f"for RTX cards: {_how_to_get('tensorrt_rtx')}; for servers: {_how_to_get('tensorrt')}",
    )


def dtype_name(dtype: Any) -> str:
    """numpy's name of a TensorRT ``DataType`` (``bfloat16`` and narrower ones by their own)."""
    return _DTYPES.get(dtype.name, dtype.name.lower())


def _how_to_get(name: str) -> str:
    jetson = " (a Jetson has it with JetPack: apt install python3-libnvinfer)" if name == "tensorrt" else ""
    return f"run: pip install 'mope-deploy[{BACKENDS[name]}]'{jetson}"
