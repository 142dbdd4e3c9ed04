"""Which engine runs a graph: the one that was asked for, or the first that passes every check here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mope_deploy.arguments import check_flag, check_integer, check_text
from mope_deploy.bundle import Bundle
from mope_deploy.engines.listing import built_engines
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.engines.onnxruntime.graph import open_graph
from mope_deploy.engines.onnxruntime.providers import (
    CPU,
    CUDA,
    Providers,
    check_providers,
    choose_providers,
    overwritten,
)
from mope_deploy.engines.onnxruntime.session import available_providers
from mope_deploy.engines.proof import prove_provider
from mope_deploy.engines.session import Session
from mope_deploy.engines.tensorrt.backends import BACKENDS, is_installed, open_backend
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.session import open_engine
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar
from mope_deploy.errors import EngineError, MissingExtraError, MopeError, ParityError, UsageError
from mope_deploy.fields import did_you_mean
from mope_deploy.limits import MAX_CACHE_MB

__all__ = ["CACHE_MB", "ENGINES", "Providers", "open_built", "open_session"]

ENGINES = ("tensorrt", "onnxruntime")  # in the order of "auto"; the first stands for all its libraries

CACHE_MB = 64  # MiB, for rows that parts of a split graph made


def open_session(
    bundle: Bundle,
    *,
    engine: str = "auto",
    graph: str | None = None,
    threads: int | None = None,
    arena: bool | None = None,
    providers: Providers | None = None,
    rebuild: bool = False,
    spinning: bool = True,
    cache_mb: int = CACHE_MB,
) -> Session:
    """Load a graph of ``bundle`` into an engine.

    Args:
        bundle: where the graph is.
        engine: a name of :data:`ENGINES`, or ``"auto"``: TensorRT where an engine was built and passes every check,
            else ONNX Runtime on CUDA, else on the CPU; the session's ``why`` says what decided.
        graph: its name; by default the canonical one.
        threads, arena: see :func:`.onnxruntime.cpu.cpu_settings`; by default the bundle's choice, else this machine's.
            Given, they make ``"auto"`` ONNX Runtime.
        providers: see :class:`.onnxruntime.session.OnnxRuntimeSession`; they make ``"auto"`` that one.
        rebuild: build the TensorRT engine again, from the bundle's own ONNX, where there is none or it is refused.
        spinning: whether ONNX Runtime's idle threads may spin; other engines have none.
        cache_mb: MiB for what the parts of a split graph made, so that an input that comes again is not run again; 0
            for none. A graph in one file has no use for it.

    Raises:
        UsageError: no such engine or graph; options that belong to another engine.
        MissingExtraError: the engine's package is not installed.
        EngineError: the engine refuses the graph.
        ParityError: a TensorRT engine, or a provider other than the CPU, does not give the golden outputs.
    """
    if check_text("engine", engine, expected=f"auto or {', '.join(ENGINES)}") not in ("auto", *ENGINES):
        raise UsageError(
            "engine",
            received=repr(engine),
            expected=f"auto or {', '.join(ENGINES)}",
            todo=did_you_mean(engine, ENGINES),
        )
    graph = None if graph is None else check_text("graph", graph, expected="the name of one, or None")
    cache_mb, rebuild = check_integer("cache_mb", cache_mb, 0, MAX_CACHE_MB), check_flag("rebuild", rebuild)
    named = {"threads": threads is not None, "arena": arena is not None, "providers": bool(check_providers(providers))}
    for_ort = next((name for name, given in named.items() if given), None)
    if for_ort and (engine == "tensorrt" or rebuild):
        raise UsageError(
            f"{for_ort} belongs to onnxruntime", received="TensorRT as the engine", expected="one of the two"
        )
    if rebuild and engine == "onnxruntime":
        raise UsageError("rebuild belongs to TensorRT", received="engine onnxruntime")
    if engine == "tensorrt" or rebuild:
        return _tensorrt(bundle, graph, rebuild=rebuild)
    cpu = cpu_settings(bundle.manifest.build.cpu, threads=threads, arena=arena, spinning=spinning)

    def onnxruntime(providers: Providers | None) -> Session:
        chosen = bundle.graph(graph, engine="onnxruntime")
        session = open_graph(chosen, bundle.file, cpu=cpu, providers=providers, cache_mb=cache_mb)
        if session.device != CPU:
            prove_provider(bundle, chosen, session, choose_providers(providers, available_providers()))
        return session

    if engine == "auto" and not for_ort:
        return _auto(bundle, graph, onnxruntime)
    return onnxruntime(providers)


def _auto(bundle: Bundle, graph: str | None, onnxruntime: Callable[[Providers | None], Session]) -> Session:
    """The first engine that runs here; ``why`` names what stood against those before it."""
    reasons = []
    refused: MopeError | None = None  # an engine that was built, and what is wrong with it
    try:
        session = _tensorrt(bundle, graph)
        session.why = "an engine built for this device, proved by the golden samples"
        return session
    except (EngineError, ParityError, MissingExtraError) as error:
        reasons.append(str(error))
        refused = error if built_engines(bundle, graph) else None
    except UsageError:  # a graph that only ONNX Runtime takes, or no graph at all
        split = any(one.parts for one in bundle.manifest.graphs if graph in (None, one.name))
        reasons.append("a split graph runs in ONNX Runtime alone" if split else "no TensorRT engine of this graph")
    try:
        providers = available_providers()
    except MissingExtraError:
        if refused is not None:
            raise refused from None
        raise
    if CUDA not in providers:
        reasons.append("; ".join(filter(None, ("this onnxruntime has no CUDA", overwritten()))))
    else:
        try:
            session = onnxruntime([CUDA])
            session.why = reasons[0]
            return session
        except (EngineError, ParityError) as error:
            reasons.append(str(error))
    session = onnxruntime(None)
    session.why = "; ".join(reasons)
    return session


def _tensorrt(bundle: Bundle, graph: str | None, *, rebuild: bool = False) -> Session:
    bundle.graph(graph, engine="tensorrt")  # a name that is not there, or one for another engine
    built = built_engines(bundle, graph)
    if not built and not rebuild:
        installed = any(map(is_installed, BACKENDS))
        # Without a library the driver is not asked: that alone starts CUDA in this process, and a fork breaks it.
        without_gpu = installed and this_device().no_gpu is not None
        raise EngineError(
            ("no TensorRT engine was built" if installed else "no TensorRT is installed")
            + (", and no GPU is here" if without_gpu else ""),
            todo=f"run: mope build {bundle.path}" if installed and not without_gpu else None,
        )
    first: MopeError | None = None
    for name, files in built:
        try:
            return open_built(bundle, graph, name, files)
        except (EngineError, ParityError, MissingExtraError) as error:
            first = first or error
    if not rebuild:
        assert first is not None
        raise first
    device = this_device()
    if device.no_gpu:
        raise EngineError("running a TensorRT engine needs a GPU", received=device.no_gpu)
    return open_built(bundle, graph, *_rebuild(bundle, graph, built))


def open_built(bundle: Bundle, graph: str | None, backend: str, files: EngineFiles) -> Session:
    """Load one engine, all checks included; :func:`open_session` chooses one by itself.

    Args:
        bundle: the graph's.
        graph: its name; by default the first that the library takes.
        backend: name of the library.
        files: where the engine is, from :func:`.tensorrt.build.build_engine` or :func:`built_engines`.

    Raises:
        UsageError: no such graph, or one for another engine.
        MissingExtraError: the library is not installed.
        EngineError: the first check that fails.
        ParityError: the golden samples do not come out.
    """
    chosen = bundle.graph(graph, engine=backend)
    return open_engine(bundle, chosen, files, open_backend(backend), this_device())


def _rebuild(bundle: Bundle, graph: str | None, built: Sequence[tuple[str, EngineFiles]]) -> tuple[str, EngineFiles]:
    """Build with the sizes and options of the engine that was there, as far as its sidecar can be read."""
    from mope_deploy.engines.tensorrt.build import build_engine  # brings the command line's libraries

    options: dict[str, Any] = {}
    for name, files in built:
        try:
            old = Sidecar.read(files.sidecar)
        except EngineError:
            continue
        options = {axis: str(sizes) for axis, sizes in old.profile.items()}
        options |= {"backend": name if is_installed(name) else None, "tf32": old.precision.tf32}
        options["workspace"] = None if old.workspace is None else old.workspace // 2**20 or None
        break
    sidecar, made = build_engine(bundle, graph=graph, **options)
    return sidecar.backend, made
