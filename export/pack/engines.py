"""TensorRT engines that go into a bundle: built from its final graphs and, where this machine has the GPU, proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mope_deploy.bundle import Bundle
from mope_deploy.engines import Session, open_built
from mope_deploy.engines.tensorrt.backends import choose_backend
from mope_deploy.engines.tensorrt.build import build_engine, compute_capabilities, why_not_run_here
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.sidecar import Sidecar, exported_names
from mope_deploy.errors import UsageError
from mope_deploy.targets import Target

__all__ = ["EngineOptions", "ExportedEngine", "check_engine_options", "export_engines"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to build engines; sizes and scratch memory are the bundle's own (``build`` in its manifest).

    Attributes:
        backend: ``tensorrt`` or ``tensorrt_rtx``; None for what fits this machine.
        compute: compute capabilities, ``"8.6,12.0"``; None for this GPU's, or all where there is none.
        tf32: let float32 products be rounded to TF32.
    """

    backend: str | None = None
    compute: str | None = None
    tf32: bool = False


@dataclass(frozen=True)
class ExportedEngine:
    """One engine, built.

    Attributes:
        graph: name of the graph it was built from.
        sidecar: what is known about it.
        files: name inside the bundle → file; the engine and its sidecar.
        not_run: why it was not run here; None if the golden samples came out right.
        session: the engine, loaded, where it could be; it does not outlive the files.
    """

    graph: str
    sidecar: Sidecar
    files: dict[str, Path]
    not_run: str | None
    session: Session | None


def check_engine_options(
    options: EngineOptions, precisions: Sequence[str], target: Target | None = None
) -> EngineOptions:
    """Find out before anything slow whether engines can be built here at all.

    Args:
        options: as asked for.
        precisions: of the graphs.
        target: the device that they are for.

    Returns:
        The same, with the target's compute capabilities where the library can be told what to build for.

    Raises:
        UsageError: nothing to build, or nothing for these compute capabilities or this target.
        MissingExtraError, EngineError: no library, or no GPU for it.
    """
    if not set(precisions) - {"int8-dynamic"}:
        raise UsageError(
            "--format trt has nothing to build",
            received=f"--precision {', '.join(precisions)}, for ONNX Runtime only",
            todo="add fp32, fp16 or int8 to --precision",
        )
    if target is not None and not target.compute_capabilities:
        raise UsageError(f"--target {target.name} has no TensorRT", received="--format trt", todo="leave trt out")
    device = this_device()
    library = choose_backend(options.backend, gpu=device.gpu is not None)
    capabilities = compute_capabilities(library, device, options.compute)
    if target is None or options.compute is not None:
        return options
    fitting = [one for one in target.compute_capabilities if one in (library.compute_capabilities or capabilities)]
    if not fitting:
        raise UsageError(
            f"{library.name} here builds nothing for --target {target.name}",
            received=f"compute capability {', '.join(library.compute_capabilities or capabilities)}",
            expected=", ".join(target.compute_capabilities),
            todo="leave trt out of --format, and build on the device: mope build BUNDLE",
        )
    return replace(options, compute=",".join(fitting)) if library.compute_capabilities else options


def export_engines(
    bundle: Bundle, folder: Path, options: EngineOptions, *, on_step: Callable[[str], None] = lambda _: None
) -> list[ExportedEngine]:
    """Build an engine of every graph of a bundle that TensorRT takes; prove those that can run here.

    Args:
        bundle: as it will be, but for the engines.
        folder: where engines are kept until they are copied into the bundle.
        options: how to build.
        on_step: called with a few words before each step.

    Raises:
        UsageError: no graph is for TensorRT.
        MissingExtraError: no library is installed.
        EngineError: the parser's or builder's refusal, or an engine that is not what it is called.
        ParityError: the golden samples do not come out.
    """
    device = this_device()
    backend = choose_backend(options.backend, gpu=device.gpu is not None).name
    graphs = [graph for graph in bundle.manifest.graphs if graph.takes(backend)]
    if not graphs:
        there = ", ".join(f"{graph.name} for {graph.runs_on}" for graph in bundle.manifest.graphs)
        raise UsageError(
            "--format trt has nothing to build", received=there, todo="add fp32, fp16 or int8 to --precision"
        )
    made: list[ExportedEngine] = []
    for graph in graphs:
        on_step(f"building the engine of {graph.name}")
        sidecar, files = build_engine(
            bundle,
            backend=backend,
            graph=graph.name,
            compute=options.compute,
            tf32=options.tf32,
            device=device,
            folder=folder,
        )
        session, not_run = None, why_not_run_here(sidecar, device)
        if not_run is None:
            on_step(f"running the golden samples through the engine of {graph.name}")
            session = open_built(bundle, graph.name, backend, files)
        engine, record = exported_names(graph, backend)
        named = {engine: files.engine, record: files.sidecar}
        made.append(ExportedEngine(graph.name, sidecar, named, not_run, session))
    return made
