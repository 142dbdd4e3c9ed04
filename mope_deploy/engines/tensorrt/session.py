"""A built engine: checked, deserialised, proved on this device, then behind the session protocol.

The checks come in one order, and the first that fails is the one reported, with both values: hashes → library version →
compute capability → operating system → deserialising → inputs and outputs → precision → golden samples.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.bundle import Bundle
from mope_deploy.engines.golden import Verification, check_outputs_are_golden
from mope_deploy.engines.proof import prove_once
from mope_deploy.engines.session import TF32_TOLERANCE, Arrays, Session, check_feeds, check_interface, check_outputs
from mope_deploy.engines.tensorrt.backends import Backend, dtype_name
from mope_deploy.engines.tensorrt.cuda import Cuda
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.inspect import check_precision, read_precisions
from mope_deploy.engines.tensorrt.log import shared_log
from mope_deploy.engines.tensorrt.profiles import Chunk, chunks, profile_shapes
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar, onnx_files
from mope_deploy.errors import EngineError
from mope_deploy.manifest import Graph

__all__ = ["TensorRTSession", "check_engine", "check_tensors", "deserialise", "open_engine", "prove"]

REBUILD = "build it again on this device: mope build BUNDLE, or add --rebuild"


def open_engine(bundle: Bundle, graph: Graph, files: EngineFiles, backend: Backend, device: Device) -> TensorRTSession:
    """Load a built engine, all checks included.

    The engine's precision is read back and the golden samples are run before anything else, unless this very engine
    was proved on this very device before.

    Raises:
        EngineError: the first check that fails.
        ParityError: the golden samples do not come out.
    """
    sidecar = Sidecar.read(files.sidecar)
    plan = check_engine(sidecar, files, bundle, graph, backend, device)
    engine = deserialise(backend, plan, files)
    check_tensors(_described(backend, engine), sidecar, graph, files)
    pad_id = bundle.manifest.text.pad_id if bundle.manifest.text else 0
    session = TensorRTSession(engine, backend, sidecar, graph, pad_id=pad_id)
    session.files = files
    session.proof = prove(session, bundle, sidecar, files, backend, device, information=session.information)
    return session


def check_engine(
    sidecar: Sidecar, files: EngineFiles, bundle: Bundle, graph: Graph, backend: Backend, device: Device
) -> bytes:
    """Everything that can be known before deserialising; returns the engine's bytes, read once, as they were hashed.

    Raises :class:`EngineError` at the first mismatch, naming both values.
    """
    name, built_on = files.engine, sidecar.built_on
    _same(str(files.sidecar), f"{sidecar.graph} for {sidecar.backend}", f"{graph.name} for {backend.name}")
    wanted = onnx_files(bundle, graph)
    for file in sorted({*sidecar.onnx, *wanted}):
        hashes = sidecar.onnx.get(file, "none"), wanted.get(file, "none")
        _same(f"{name} was built from another ONNX file: {file}", *hashes, received="SHA-256 {:.12}", expected="{:.12}")
    try:
        _same(f"{name} is damaged", name.stat().st_size, sidecar.engine.bytes, received="{:,} bytes", expected="{:,}")
        plan = name.read_bytes()
    except OSError as error:
        raise EngineError(f"{name} cannot be read", received=error.strerror, todo=REBUILD) from error
    digest = hashlib.sha256(plan).hexdigest()
    _same(f"{name} is damaged", digest, sidecar.engine.sha256, received="SHA-256 {:.12}…", expected="{:.12}…")
    version = f"{name} was built by another version of {backend.name}"
    _same(version, sidecar.version, backend.version, expected="{}, installed here")
    _check_header(backend, plan, files)
    targets = ", ".join(sidecar.compute_capabilities)
    if device.compute_capability is None:
        needs = f"compute capability {targets}"
        raise EngineError(f"{name} needs a GPU to run", received=device.no_gpu or "no GPU", expected=needs)
    if device.compute_capability not in sidecar.compute_capabilities:
        raise EngineError(
            f"{name} was built for another GPU",
            received=f"compute capability {targets}",
            expected=f"{device.compute_capability}, that of {device.gpu}",
            todo=REBUILD,
        )
    _same(f"{name} was built on another system", built_on.os, device.os)
    if built_on.compute_capability is not None:
        _same(f"{name} was built on another Jetson Linux", built_on.l4t or "none", device.l4t or "none")
    return plan


def _same(what: str, found: object, wanted: object, *, received: str = "{}", expected: str = "{}") -> None:
    if found != wanted:
        raise EngineError(what, received=received.format(found), expected=expected.format(wanted), todo=REBUILD)


def _check_header(backend: Backend, plan: bytes, files: EngineFiles) -> None:
    """TensorRT-RTX reads an engine's header without deserialising it; a full TensorRT has no such call.

    Without a GPU a good engine is reported invalid too, with no reason among these.
    """
    flags = getattr(backend.module, "EngineInvalidityDiagnostics", None)
    if flags is None or not hasattr(backend.module.Runtime, "get_engine_validity"):
        return
    _, why = _runtime(backend).get_engine_validity(plan)
    wanted = f"one built by {backend.name} {backend.version}"
    words = {"MALFORMED_ENGINE": "no engine of this library", "VERSION_MISMATCH": "an engine of another version"}
    for flag, received in words.items():
        if int(why) & int(getattr(flags, flag, 0)):
            raise EngineError(str(files.engine), received=received, expected=wanted, todo=REBUILD)


def deserialise(backend: Backend, plan: bytes, files: EngineFiles) -> Any:
    """The library's engine object; :class:`EngineError` where it returns None instead, with what its log says."""
    Cuda().activate()
    log = shared_log(backend)
    log.clear()
    engine = _runtime(backend).deserialize_cuda_engine(plan)
    if engine is None:
        reason = " ".join(log.errors[0].split())[:400] if log.errors else "it said nothing"
        raise EngineError(f"{backend.name} {backend.version} refuses {files.engine}: {reason}", todo=REBUILD)
    return engine


def check_tensors(
    found: Mapping[str, Mapping[str, tuple[str, tuple[int | None, ...]]]],
    sidecar: Sidecar,
    graph: Graph,
    files: EngineFiles,
) -> None:
    """The engine has the tensors that its sidecar and the manifest promise; int64 inputs may have become int32.

    Args:
        found: ``"inputs"`` and ``"outputs"`` → name → (dtype, sizes).

    Raises:
        EngineError: at the first tensor that differs.
    """
    for kind in ("inputs", "outputs"):
        built, promised = getattr(sidecar, kind), getattr(graph, kind)
        check_interface(kind, found[kind], built, str(files.engine))
        narrow = {spec.name for spec in built if spec.dtype == "int32"}
        expected = [replace(s, dtype="int32") if s.dtype == "int64" and s.name in narrow else s for s in promised]
        check_interface(kind, found[kind], expected, str(files.engine))


def prove(
    session: Session,
    bundle: Bundle,
    sidecar: Sidecar,
    files: EngineFiles,
    backend: Backend,
    device: Device,
    *,
    information: Callable[[], str],
) -> Verification | None:
    """Read the precision back and run the golden samples before any prediction, once per engine and device.

    See :func:`mope_deploy.engines.proof.prove_once`.

    Args:
        information: gives the engine inspector's JSON.

    Returns:
        What was measured, or None if a record covers this engine on this device.

    Raises:
        EngineError: no matrix layer of the engine has the precision that the graph is called by.
        ParityError: the golden samples do not come out. Nothing is recorded in either case.
    """

    def measure() -> tuple[Verification, Mapping[str, int]]:
        layers = read_precisions(information())
        check_precision(layers, sidecar.precision.declared, str(files.engine))
        return check_outputs_are_golden(bundle, session, graph=sidecar.graph), layers

    key = {"engine_sha256": sidecar.engine.sha256, "bundle_sha256": bundle.sha256}
    return prove_once(files.proof, {**key, "version": backend.version, "device": device}, measure)


class TensorRTSession:
    """A deserialised engine on the first GPU; the :class:`~mope_deploy.engines.session.Session` protocol.

    Batches of any size run: they are cut and padded to the sizes the engine was built for. Memory on the GPU grows to
    what the largest of them needs and is kept. One thread at a time.

    Args:
        engine, backend: from :func:`deserialise`, and its library.
        sidecar: its profile and tensors.
        graph: what the manifest says about it.
        pad_id: of the tokenizer.

    Raises:
        EngineError: no execution context could be made.
    """

    proof: Verification | None = None  # what golden samples measured when it was loaded; None if run at an earlier load
    files: EngineFiles | None = None  # where it came from, if from a file
    settings: dict[str, Any]

    def __init__(self, engine: Any, backend: Backend, sidecar: Sidecar, graph: Graph, *, pad_id: int = 0) -> None:
        self.name = backend.name
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.why, self.settings = "", {}
        self.least_tolerance = TF32_TOLERANCE if sidecar.precision.tf32 else 0.0
        self.profile, self._pad_id = sidecar.profile, pad_id
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in (*sidecar.inputs, *sidecar.outputs)}
        self._formats = backend.module.LayerInformationFormat
        self._cuda = Cuda()
        self._cuda.activate()
        self.device = self._cuda.name
        self._engine = engine  # outlives its context
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{backend.name} could not start the engine", todo="free memory on the GPU")
        self._stream = self._cuda.stream()
        self._memory: dict[str, tuple[int, int]] = {}  # name of a tensor → address, bytes
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        names = check_outputs(outputs, self.outputs)
        check_feeds(feeds, self.inputs)
        with self._lock:
            self._cuda.activate()
            parts = [self._run(one) for one in chunks(feeds, self.inputs, self.profile, pad_id=self._pad_id)]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def information(self) -> str:
        """What the engine inspector says in JSON, with inputs of the sizes the engine is best at.

        Without sizes it leaves formats out. Empty if the library gives nothing.
        """
        with self._lock:
            self._cuda.activate()
            for spec in self.inputs:
                shapes = profile_shapes(spec, self.profile)
                if shapes is not None:
                    self._context.set_input_shape(spec.name, shapes[1])
            inspector = self._engine.create_engine_inspector()
            if inspector is None:
                return ""
            inspector.execution_context = self._context
            return inspector.get_engine_information(self._formats.JSON) or ""

    def _run(self, chunk: Chunk) -> Arrays:
        """One batch that fits the profile. Every output is computed: an engine has no way to leave one out."""
        sent = {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in chunk.feeds.items()}
        for name, array in sent.items():
            if not self._context.set_input_shape(name, array.shape):
                raise EngineError(f"{self.name} refuses input {name}", received=f"shape {array.shape}")
            address = self._room(name, array.nbytes)
            self._cuda.upload(address, array, self._stream)
            self._bind(name, address)
        got: Arrays = {}
        for spec in self.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise EngineError(f"{self.name} cannot tell the shape of output {spec.name}", received=f"{shape}")
            got[spec.name] = np.empty(shape, self._dtypes[spec.name])
            self._bind(spec.name, self._room(spec.name, got[spec.name].nbytes))
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"{self.name} failed while running the engine on {self.device}")
        for name, array in got.items():
            self._cuda.download(array, self._memory[name][0], self._stream)
        self._cuda.wait(self._stream)  # `sent` has to live until here
        return {name: array[: chunk.rows] for name, array in got.items()}

    def _room(self, name: str, size: int) -> int:
        """Address of at least ``size`` bytes for a tensor; nothing is in flight when it has to grow."""
        address, held = self._memory.get(name, (0, 0))
        if held >= size and address:
            return address
        if address:
            del self._memory[name]
            self._cuda.free(address)
        self._memory[name] = (self._cuda.allocate(size), size)
        return self._memory[name][0]

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self.name} refuses the address of {name}")


def _described(backend: Backend, engine: Any) -> dict[str, dict[str, tuple[str, tuple[int | None, ...]]]]:
    """Inputs and outputs as the engine itself reports them; None where a size varies."""
    found: dict[str, dict[str, tuple[str, tuple[int | None, ...]]]] = {"inputs": {}, "outputs": {}}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        kind = "inputs" if engine.get_tensor_mode(name) == backend.module.TensorIOMode.INPUT else "outputs"
        sizes = tuple(None if size == -1 else int(size) for size in engine.get_tensor_shape(name))
        found[kind][name] = (dtype_name(engine.get_tensor_dtype(name)), sizes)
    return found


@functools.cache
def _runtime(backend: Backend) -> Any:
    """The one runtime of a library in this process; engines must not outlive it."""
    try:
        return backend.module.Runtime(shared_log(backend).logger)
    except TypeError:  # how the Python API reports that the library returned nothing
        raise EngineError(f"{backend.name} {backend.version} could not start its runtime") from None
