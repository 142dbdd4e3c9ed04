"""ONNX Runtime behind the session protocol. Works from 1.18 (JetPack 6) on."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.engines.graph_file import check_graph_file
from mope_deploy.engines.onnxruntime.binding import Bindings
from mope_deploy.engines.onnxruntime.cpu import CpuSettings, cpu_settings
from mope_deploy.engines.onnxruntime.library import import_onnxruntime, one_line
from mope_deploy.engines.onnxruntime.providers import (
    CPU,
    CUDA,
    Chosen,
    Providers,
    choose_providers,
    tf32_is_allowed,
)
from mope_deploy.engines.session import TF32_TOLERANCE, Arrays, alone, check_feeds, check_interface, check_outputs
from mope_deploy.errors import EngineError, MopeError
from mope_deploy.manifest import Graph

__all__ = ["OnnxRuntimeSession", "available_providers", "library_version"]

# How its releases word that a file is newer than they know: the IR version, the opset, one operator.
_TOO_OLD = r"IR version|model file format version|opset|not a registered function/op|Could not find an implementation"


class OnnxRuntimeSession:
    """One file in ONNX Runtime; the :class:`~mope_deploy.engines.session.Session` protocol. It needs no bundle.

    A graph in ``int8-dynamic`` runs one sample at a time: its ranges are those of whole tensors.

    After a fork it goes on in the new process if it has one thread on a CPU; threads and GPUs do not survive a fork,
    and :meth:`run` says so rather than wait for them.

    Args:
        path: the ONNX file.
        graph: what the manifest says, or will say, about it: names, dtypes and axes are compared.
        cpu: threads and arena; by default what :func:`.cpu.cpu_settings` finds best here.
        providers: ONNX Runtime's execution providers, names (``"cuda"`` or ``"CUDAExecutionProvider"``) or (name,
            options) pairs; the CPU by default. The first one must come up: ONNX Runtime itself would fall back to the
            CPU without a word. What options they are given by default: providers.py.
        takes_turns: whether another session runs before and after this one does: then its threads, which otherwise
            spin for a while in wait of more work, must not take the cores from that one's.

    Raises:
        UsageError: no provider is called that.
        MissingExtraError: onnxruntime is not installed.
        EngineError: the file holds what no export writes (:mod:`mope_deploy.engines.graph_file`); onnxruntime refuses
            it, has no such provider, or the provider does not come up.
    """

    name = "onnxruntime"
    why = ""

    def __init__(
        self,
        path: Path,
        graph: Graph,
        *,
        cpu: CpuSettings | None = None,
        providers: Providers | None = None,
        takes_turns: bool = False,
    ) -> None:
        self._process = os.getpid()
        chosen, cpu = choose_providers(providers, available_providers()), cpu or cpu_settings()
        self.settings = dataclasses.asdict(cpu)
        self.least_tolerance = TF32_TOLERANCE if tf32_is_allowed(chosen) else 0.0
        self.inputs, self.outputs = graph.inputs, graph.outputs
        check_graph_file(path, graph)
        try:
            self._session = _open(path, cpu, chosen, takes_turns)
            inputs, outputs = _described(self._session.get_inputs()), _described(self._session.get_outputs())
        except MopeError:
            raise
        except Exception as error:  # the library's own exceptions share no base class but this
            raise _refused(error, path, graph) from error
        self.device = self._session.get_providers()[0]
        self._forks = cpu.threads == 1 and self.device == CPU  # whether it still works in a process forked off
        check_interface("inputs", inputs, self.inputs, str(path))
        check_interface("outputs", outputs, self.outputs, str(path))
        self._alone = graph.precision == "int8-dynamic"
        self._shapes = {spec.name: spec.shape for spec in self.inputs}
        self._lock = threading.Lock()  # of the buffers
        self._bindings: Bindings | None = None
        if chosen[0][0] == CUDA:
            self._bindings = Bindings(import_onnxruntime(), self._session, self.inputs, self.outputs)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        names = check_outputs(outputs, self.outputs)
        check_feeds(feeds, self.inputs)
        self._check_process()
        try:
            if not self._alone:
                return self._run(feeds, names)
            parts = [self._run(one, names) for one in alone(feeds, self._shapes)]
        except Exception as error:
            raise EngineError(f"onnxruntime failed while running the graph: {one_line(error)}") from error
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _check_process(self) -> None:
        if self._forks or os.getpid() == self._process:
            return
        raise EngineError(
            "this session was opened before its process was forked",
            received=f"{self.device} with {self.settings['threads']} threads, which no forked process has",
            expected="a session of this process, or one on the CPU with threads=1",
            todo="load the bundle in each process, or start processes by spawn",
        )

    def __del__(self) -> None:
        # In a forked process its destructor would wait for threads that are not there: it is never destroyed there.
        if (held := getattr(self, "_session", None)) is not None and os.getpid() != self._process:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))

    def _run(self, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Arrays:
        if self._bindings is not None:
            with self._lock:
                found = self._bindings.run(feeds, names)
            if found is not None:
                return found
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


def _open(path: Path, cpu: CpuSettings, chosen: Chosen, takes_turns: bool) -> Any:
    ort, first = import_onnxruntime(), chosen[0][0]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: every error is raised as well, and reported once
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called
    options.intra_op_num_threads, options.enable_cpu_mem_arena = cpu.threads, cpu.arena
    if first == CPU:  # else the arena takes in the weights, and keeps the room that unpacking them took
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if not cpu.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif takes_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = [(name, given) if given else name for name, given in chosen]
    session = _without_fallback(ort.InferenceSession)(_as_utf8(path), options, providers=wanted)
    active = session.get_providers()
    if first not in active:
        raise EngineError(
            f"onnxruntime could not start {first}",
            received=f"a session on {', '.join(active)}",
            todo="check the driver and the libraries it needs, or leave providers out to use the CPU",
        )
    return session


def _as_utf8(path: Path) -> str:
    """The path in letters whose UTF-8, which onnxruntime opens, are its bytes, whatever encoding this locale reads."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EngineError(f"{path} has a name that is no UTF-8", todo="rename the folder") from error


class _NoFallback:
    """Beside ONNX Runtime's session class: it never falls back to other providers, nor prints to say so.

    From 1.19 or so on an argument says that; in 1.18 only this attribute does, which the constructor sets to True.
    """

    @property
    def _enable_fallback(self) -> bool:
        return False

    @_enable_fallback.setter
    def _enable_fallback(self, value: bool) -> None:
        pass


@functools.cache
def _without_fallback(kind: type) -> Any:
    return type(kind.__name__, (_NoFallback, kind), {})


def available_providers() -> list[str]:
    """What the installed onnxruntime can be asked for; each may still fail to start.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it cannot be imported.
    """
    return list(import_onnxruntime().get_available_providers())


def library_version() -> str:
    """Version of the installed onnxruntime. Raises as :func:`available_providers`."""
    return str(import_onnxruntime().__version__)


def _described(tensors: Sequence[Any]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Name → (numpy's dtype, sizes); ONNX Runtime reports an axis that varies by its name or as None."""
    found = {}
    for tensor in tensors:
        dtype = tensor.type.removeprefix("tensor(").removesuffix(")")
        sizes = tuple(size if isinstance(size, int) else None for size in tensor.shape)
        found[tensor.name] = "float32" if dtype == "float" else dtype, sizes
    return found


def _refused(error: Exception, path: Path, graph: Graph) -> EngineError:
    message, version = one_line(error), library_version()
    if re.search(_TOO_OLD, str(error)):
        return EngineError(
            f"onnxruntime {version} is too old for {path.name}",
            received=f"a graph of IR version {graph.ir_version} and opset {graph.opset} ({message})",
            expected="one that it reads",
            todo="upgrade onnxruntime, or run another graph of the bundle",
        )
    return EngineError(f"onnxruntime {version} refuses {path}: {message}")
