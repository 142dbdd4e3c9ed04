"""The process that builds one engine: ``python -m mope_deploy.engines.tensorrt.worker ENGINE``, a request on its input.

A process of its own because TensorRT keeps the first logger it is given (ours must be it: its ERROR lines decide),
because a builder that runs out of memory is killed (the caller must live to say so), and because its peak memory is
then the builder's. Answers are lines of JSON on standard output: ``progress``, then ``done`` or ``error``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mope_deploy.engines.tensorrt.backends import Backend, dtype_name, open_backend
from mope_deploy.engines.tensorrt.log import Log, shared_log
from mope_deploy.engines.tensorrt.profiles import Sizes, TopK, check_topk, profile_shapes
from mope_deploy.errors import EngineError, MopeError
from mope_deploy.manifest import TensorSpec

__all__ = ["main"]

Say = Callable[[Mapping[str, Any]], None]
_PROGRESS_EVERY_S = 0.2
_UNFIT = "not self-consistent"  # how a profile that some layer cannot take is worded: a warning, and an engine


def main() -> int:
    """Answer one request. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: Mapping[str, Any]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    try:
        asked = sys.stdin.buffer.readline()
        threading.Thread(target=_end_with_parent, args=(Path(sys.argv[1]),), daemon=True).start()
        if not asked.endswith(b"\n"):
            time.sleep(60)  # until that thread ends us: nobody is left to answer
        request = json.loads(asked)
        say({"event": "done", **_build(request, say)})
    except MopeError as error:
        parts = {"received": error.received, "expected": error.expected}
        plain = {key: None if value is None else str(value) for key, value in parts.items()}
        say({"event": "error", "kind": type(error).__name__, "what": error.what, "todo": error.todo, **plain})
        return 1
    return 0


def _end_with_parent(engine: Path) -> None:
    """Wait until standard input ends, as it does when the parent dies, however that came; then leave nothing behind.

    The builder leaves the interpreter's lock to other threads while it works.
    """
    while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    with contextlib.suppress(OSError):
        engine.unlink()
    os._exit(1)


def _build(request: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Parse, check, build, and write the engine to ``request["engine"]``."""
    backend = open_backend(request["backend"])
    log = shared_log(backend)
    trt = backend.module
    try:
        builder = trt.Builder(log.logger)
    except TypeError:  # how the Python API reports that the library returned nothing
        raise _failed(f"{backend.name} {backend.version} could not start its builder", log) from None
    network = _parse(trt, builder, log, Path(request["onnx"]))
    profile = {axis: Sizes(*sizes) for axis, sizes in request["profile"].items()}
    inputs, outputs = (
        [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in request[kind]] for kind in ("inputs", "outputs")
    )
    found = {
        "inputs": _tensors([network.get_input(i) for i in range(network.num_inputs)], inputs),
        "outputs": _tensors([network.get_output(i) for i in range(network.num_outputs)], outputs),
    }
    check_topk(_topk(trt, network), profile)
    precision = _precision(trt, network, request["precision"])
    config = builder.create_builder_config()
    _configure(backend, config, request)
    _add_profile(builder, config, inputs, profile)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, say)
    engine = builder.build_serialized_network(network, config)
    if engine is None or log.errors:
        raise _failed(f"{backend.name} {backend.version} built no engine that can be trusted", log)
    if unfit := [line for line in log.warnings if _UNFIT in line]:
        raise EngineError(f"{backend.name} doubts the profile: {_one_line(unfit[0])}")
    with open(request["engine"], "wb") as file:
        file.write(memoryview(engine))
    return {
        **found,
        "precision": precision,
        "version": backend.version,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _parse(trt: Any, builder: Any, log: Log, onnx: Path) -> Any:
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    if network is None or not network.get_flag(typed):
        raise _failed("the builder gave no strongly typed network", log)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(onnx)) or log.errors:
        if parser.num_errors:
            first, node = parser.get_error(0), ""
            if hasattr(first, "node_operator"):
                node = f" at {first.node_operator()} {first.node_name()}".rstrip()
            raise EngineError(f"the parser refuses {onnx.name}{node}: {_one_line(first.desc())}")
        raise _failed(f"the parser refuses {onnx.name}", log)
    if network.num_layers == 0:  # some garbage passes for an empty model
        raise EngineError(f"the parser finds nothing in {onnx.name}", todo="export the model again")
    return network


def _tensors(tensors: Sequence[Any], specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Inputs or outputs as the network has them; an axis that varies takes the name that the manifest gives it."""
    known = {spec.name: spec for spec in specs}
    made = []
    for tensor in tensors:
        spec, sizes = known.pop(tensor.name, None), tuple(tensor.shape)
        dtype = dtype_name(tensor.dtype)
        narrowed = spec is not None and (spec.dtype, dtype) == ("int64", "int32")  # by a library without the former
        fits = spec is not None and len(sizes) == len(spec.shape) and (dtype == spec.dtype or narrowed)
        if spec is None or not fits or any(a != b for a, b in zip(sizes, spec.shape, strict=True) if a != -1):
            raise EngineError(
                f"the parsed network differs from the manifest at {tensor.name}",
                received=f"{dtype} {sizes}",
                expected=spec.form if spec else f"one of {', '.join(s.name for s in specs)}",
                todo="export the model again",
            )
        made.append({"name": tensor.name, "dtype": dtype, "shape": list(spec.shape)})
    if known:
        raise EngineError("the parsed network lacks a tensor of the manifest", received=f"no {next(iter(known))}")
    return made


def _topk(trt: Any, network: Any) -> list[TopK]:
    """K is read from the shape of the output: the layer itself calls a K that came as a constant tensor dynamic."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type != trt.LayerType.TOPK:
            continue
        layer.__class__ = trt.ITopKLayer  # how the Python API gives a layer its own attributes
        axis = int(layer.axes).bit_length() - 1
        source, taken = layer.get_input(0), layer.get_output(0)
        size: int | str | None = int(source.shape[axis])
        if size == -1:
            size = getattr(source, "get_dimension_name", lambda _: None)(axis) or None
        found.append(TopK(layer.name, int(taken.shape[axis]), size))
    return found


def _precision(trt: Any, network: Any, declared: str) -> dict[str, Any]:
    """Types of the products in the parsed network, which are those of a strongly typed engine; checked as declared."""
    products: Counter[str] = Counter()
    quantised = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type in (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION):
            products[dtype_name(layer.get_input(0).dtype)] += 1
        quantised += layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    wanted = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(declared)
    strays = set(products) - {wanted, "float32"} if wanted else set()
    if (wanted and (not products[wanted] or strays or (declared == "fp32" and quantised))) or (
        declared.startswith("int8") and not quantised
    ):
        counts = ", ".join(f"{count} of {name}" for name, count in products.items()) or "none"
        raise EngineError(
            f"the graph is called {declared} and is something else",
            received=f"products: {counts}; {quantised} layers that quantise",
            expected=f"products of {wanted}" if wanted else "layers that quantise",
            todo="export the model again",
        )
    return {"products": dict(products), "quantised": quantised}


def _configure(backend: Backend, config: Any, request: Mapping[str, Any]) -> None:
    trt = backend.module
    if request["tf32"]:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and ten bits of mantissa are not fp32
    assert config.get_flag(trt.BuilderFlag.TF32) == request["tf32"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells names only, and no types
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if not backend.compute_capabilities:
        return  # builds for the GPU at hand
    config.num_compute_capabilities = len(request["compute_capabilities"])
    for i, capability in enumerate(request["compute_capabilities"]):
        value = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
        if not config.set_compute_capability(value, i):
            raise EngineError(f"{backend.name} {backend.version} refuses compute capability {capability}")


def _add_profile(builder: Any, config: Any, inputs: Sequence[TensorSpec], profile: Mapping[str, Sizes]) -> None:
    made = builder.create_optimization_profile()
    for spec in inputs:
        shapes = profile_shapes(spec, profile)
        if shapes is not None:
            made.set_shape(spec.name, *shapes)
    if profile and config.add_optimization_profile(made) < 0:
        raise EngineError("the builder refuses the profile", received=", ".join(f"{a} {s}" for a, s in profile.items()))


def _monitor(trt: Any, say: Say) -> Any:
    """Reports the builder's phases."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def tell(self, phase: str, step: int) -> None:
            now = time.monotonic()
            if now - self.last >= _PROGRESS_EVERY_S:
                self.last = now
                say({"event": "progress", "phase": phase, "step": step, "steps": self.steps.get(phase, 0)})

    return Monitor()


def _failed(what: str, log: Log) -> EngineError:
    errors = log.errors
    more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
    return EngineError(f"{what}: {_one_line(errors[0]) if errors else 'it said nothing'}{more}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]}…"


if __name__ == "__main__":
    sys.exit(main())
