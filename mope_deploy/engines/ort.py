"""ONNX Runtime behind the session protocol. Works from 1.18 (JetPack 6) on."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from mope_deploy.engines.session import Arrays, check_feeds, check_interface, check_outputs
from mope_deploy.errors import EngineError, MissingExtraError, UsageError
from mope_deploy.extras import require
from mope_deploy.manifest import Graph

__all__ = ["CPU", "CUDA", "OnnxRuntimeSession", "available_providers"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# How its releases word that a file is newer than they know: the IR version, the opset, one operator.
_TOO_OLD = r"IR version|model file format version|opset|not a registered function/op|Could not find an implementation"


class OnnxRuntimeSession:
    """One graph in ONNX Runtime; the :class:`~mope_deploy.engines.session.Session` protocol.

    Args:
        path: the ONNX file.
        graph: what the manifest says about it.
        threads: for one operator; without it ONNX Runtime's own default, the number of cores.
        providers: ONNX Runtime's execution providers, names or (name, options) pairs; the CPU by default. The first one
            must come up: ONNX Runtime itself would fall back to the CPU without a word. CUDA without options of its own
            computes float32 as float32 (``use_tf32=0``).

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it refuses the file, or the provider does not come up.
    """

    name = "onnxruntime"
    why = ""
    least_tolerance = 0.0

    def __init__(
        self,
        path: Path,
        graph: Graph,
        *,
        threads: int | None = None,
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    ) -> None:
        ort = _import()
        wanted = [_with_options(provider) for provider in providers or [CPU]]
        _check_available(ort, wanted)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # fatal only: every error is raised as well, and reported once
        if threads is not None:
            if threads < 1:
                raise UsageError("threads", received=threads, expected="at least 1")
            options.intra_op_num_threads = threads
        try:
            # Falling back to other providers prints to standard output, where a command's JSON goes; in 1.18 no option
            # keeps it from that.
            with contextlib.redirect_stdout(io.StringIO()):
                self._session = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
            self._session.disable_fallback()
            loaded = {
                "inputs": _described(self._session.get_inputs()),
                "outputs": _described(self._session.get_outputs()),
            }
        except Exception as error:  # the library's own exceptions share no base class but this
            raise _refused(error, path, graph, ort.__version__) from error
        active = self._session.get_providers()
        if _provider(wanted[0]) not in active:
            raise EngineError(
                f"onnxruntime could not start {_provider(wanted[0])}",
                received=f"a session on {', '.join(active)}",
                todo="check the driver and the libraries it needs, or leave providers out to use the CPU",
            )
        self.device = active[0]
        self.inputs, self.outputs = graph.inputs, graph.outputs
        check_interface("inputs", loaded["inputs"], self.inputs, str(path))
        check_interface("outputs", loaded["outputs"], self.outputs, str(path))

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        names = check_outputs(outputs, self.outputs)
        check_feeds(feeds, self.inputs)
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise EngineError(f"onnxruntime failed while running the graph: {_message(error)}") from error


def available_providers() -> list[str]:
    """What the installed onnxruntime can be asked for; each may still fail to start.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it cannot be imported.
    """
    return list(_import().get_available_providers())


def _with_options(provider: str | tuple[str, Mapping[str, Any]]) -> str | tuple[str, Mapping[str, Any]]:
    """TF32 is on by default in the CUDA provider, and ten bits of mantissa are not fp32."""
    return (CUDA, {"use_tf32": "0"}) if provider == CUDA else provider


def _import() -> ModuleType:
    try:
        return require("onnxruntime", extra="ort", purpose="running a bundle")
    except MissingExtraError as error:
        raise MissingExtraError(
            error.what,
            todo="run: pip install 'mope-deploy[ort]' for a CPU or 'mope-deploy[ort-gpu]' for CUDA; "
            "on a Jetson, the onnxruntime-gpu wheel made for its JetPack",
        ) from error
    except Exception as error:  # a wheel for another numpy, Python or CUDA stumbles while it is imported
        raise EngineError(
            f"onnxruntime is installed and cannot be imported: {_message(error)}", todo="install it again"
        ) from error


def _check_available(ort: ModuleType, wanted: Sequence[str | tuple[str, Mapping[str, Any]]]) -> None:
    available = ort.get_available_providers()
    for provider in wanted:
        if _provider(provider) not in available:
            raise EngineError(
                f"this onnxruntime has no {_provider(provider)}",
                expected=f"one of {', '.join(available)}",
                todo="CUDA and TensorRT need onnxruntime-gpu: pip install 'mope-deploy[ort-gpu]'",
            )


def _provider(provider: str | tuple[str, Mapping[str, Any]]) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _described(tensors: Sequence[Any]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Name → (numpy's dtype, sizes); ONNX Runtime reports an axis that varies by its name or as None."""
    return {
        tensor.name: (
            _DTYPES.get(tensor.type, tensor.type),
            tuple(size if isinstance(size, int) else None for size in tensor.shape),
        )
        for tensor in tensors
    }


def _refused(error: Exception, path: Path, graph: Graph, version: str) -> EngineError:
    message = _message(error)
    if re.search(_TOO_OLD, str(error)):
        return EngineError(
            f"onnxruntime {version} is too old for {path.name}",
            received=f"a graph of IR version {graph.ir_version} and opset {graph.opset} ({message})",
            expected="one that it reads",
            todo="upgrade onnxruntime, or run another graph of the bundle",
        )
    return EngineError(f"onnxruntime {version} refuses {path}: {message}")


def _message(error: Exception) -> str:
    """One line; of a long one the end, which says what happened where the beginning names sources and functions."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else f"… {message[-300:]}"
