"""Inference engines: one session protocol (session.py), one file per engine, chosen here: by name, or by what runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mope_deploy.bundle import Bundle
from mope_deploy.engines.session import Session
from mope_deploy.errors import EngineError, MissingExtraError, MopeError, ParityError, UsageError
from mope_deploy.fields import nearest
from mope_deploy.manifest import Graph

if TYPE_CHECKING:
    from mope_deploy.engines.onnxruntime.cpu import CpuSettings
    from mope_deploy.engines.tensorrt.sidecar import EngineFiles

__all__ = [
    "CACHE_MB",
    "ENGINES",
    "Providers",
    "Session",
    "built_engines",
    "engines_not_run",
    "open_built",
    "open_session",
    "providers_here",
]

ENGINES = ("tensorrt", "onnxruntime")  # in the order of "auto"; the first stands for all its libraries

CACHE_MB = 64  # MiB, for rows that parts of a split graph made
_MOST_CACHE_MB = 2**20

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]


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
        threads, arena: see :func:`mope_deploy.engines.onnxruntime.cpu.cpu_settings`; by default the bundle's choice, else this
            machine's. Given, they make ``"auto"`` ONNX Runtime.
        providers: see :class:`mope_deploy.engines.onnxruntime.session.OnnxRuntimeSession`; they make ``"auto"`` that one.
        rebuild: build the TensorRT engine again, from the bundle's own ONNX, where there is none or it is refused.
        spinning: whether ONNX Runtime's idle threads may spin; other engines have none.
        cache_mb: MiB for what the parts of a split graph made, so that an input that comes again is not run again; 0
            for none. A graph in one file has no use for it.

    Raises:
        UsageError: no such engine or graph; options that belong to another engine.
        MissingExtraError: the engine's package is not installed.
        EngineError: the engine refuses the graph.
        ParityError: a TensorRT engine does not give the golden outputs.
    """
    if engine not in ("auto", *ENGINES):
        hint = nearest(engine, ENGINES)
        raise UsageError(
            "engine",
            received=repr(engine),
            expected=f"auto or {', '.join(ENGINES)}",
            todo=f"did you mean {hint!r}?" if hint else None,
        )
    if arena is not None and not isinstance(arena, bool):
        raise UsageError("arena", received=repr(arena), expected="True, False or None")
    if not isinstance(cache_mb, int) or not 0 <= cache_mb <= _MOST_CACHE_MB:
        raise UsageError("cache", received=f"{cache_mb!r} MiB", expected=f"0 (none) to {_MOST_CACHE_MB:,} MiB")
    named = {"threads": threads is not None, "arena": arena is not None, "providers": bool(providers)}
    for_ort = next((name for name, given in named.items() if given), None)
    if for_ort and (engine == "tensorrt" or rebuild):
        raise UsageError(
            f"{for_ort} belongs to onnxruntime", received="TensorRT as the engine", expected="one of the two"
        )
    if rebuild and engine == "onnxruntime":
        raise UsageError("rebuild belongs to TensorRT", received="engine onnxruntime")
    if engine == "tensorrt" or rebuild:
        return _tensorrt(bundle, graph, rebuild=rebuild)
    from mope_deploy.engines.onnxruntime.cpu import cpu_settings

    cpu = cpu_settings(bundle.manifest.build.cpu, threads=threads, arena=arena, spinning=spinning)
    if engine == "auto" and not for_ort:
        return _auto(bundle, graph, cpu, cache_mb)
    return _onnxruntime(bundle, graph, cpu, providers, cache_mb)


def _auto(bundle: Bundle, graph: str | None, cpu: CpuSettings, cache_mb: int) -> Session:
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
    from mope_deploy.engines.onnxruntime.providers import CPU, CUDA
    from mope_deploy.engines.onnxruntime.session import available_providers

    try:
        providers = available_providers()
    except MissingExtraError:
        if refused is not None:
            raise refused from None
        raise
    if CUDA not in providers:
        reasons.append("this onnxruntime has no CUDA")
    else:
        try:
            session = _onnxruntime(bundle, graph, cpu, [CUDA, CPU], cache_mb)
            session.why = reasons[0]
            return session
        except EngineError as error:
            reasons.append(str(error))
    session = _onnxruntime(bundle, graph, cpu, None, cache_mb)
    session.why = "; ".join(reasons)
    return session


def _onnxruntime(
    bundle: Bundle, graph: str | None, cpu: CpuSettings, providers: Providers | None, cache_mb: int
) -> Session:
    chosen = bundle.graph(graph, engine="onnxruntime")
    if not chosen.parts:
        return _open_file(bundle, chosen, cpu, providers)
    from mope_deploy.engines.cache import RowCache
    from mope_deploy.engines.split import SplitSession

    parts = {}
    for part in chosen.parts:
        alone = replace(chosen, file=part.file, data=part.data, inputs=part.inputs, outputs=part.outputs, parts=())
        parts[part.modality] = _open_file(bundle, alone, cpu, providers, takes_turns=True)
    main = _open_file(bundle, chosen, cpu, providers, takes_turns=True)
    return SplitSession(chosen, main, parts, cache=RowCache(limit=cache_mb * 2**20) if cache_mb else None)


def _open_file(
    bundle: Bundle, graph: Graph, cpu: CpuSettings, providers: Providers | None, *, takes_turns: bool = False
) -> Session:
    """One ONNX file in ONNX Runtime; ``graph`` describes that file."""
    from mope_deploy.engines.onnxruntime.providers import cache_folder, plans_shapes
    from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
    from mope_deploy.engines.tensorrt.profiles import make_profile

    text = bundle.manifest.text
    return OnnxRuntimeSession(
        bundle.file(graph.file),
        graph,
        cpu=cpu,
        providers=providers,
        profile=make_profile(bundle.manifest, graph.inputs) if plans_shapes(providers) else None,
        cache=cache_folder(bundle.sha256, graph.file),
        pad_id=text.pad_id if text else 0,
        takes_turns=takes_turns,
    )


def providers_here(bundle: Bundle) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(short name, whether it runs here or why not, its options) of ONNX Runtime's providers.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it cannot be imported.
    """
    from mope_deploy.engines.onnxruntime.providers import cache_folder, provider_states
    from mope_deploy.engines.onnxruntime.session import available_providers
    from mope_deploy.engines.tensorrt.device import this_device
    from mope_deploy.engines.tensorrt.profiles import make_profile

    available = available_providers()
    try:
        graph = bundle.graph(engine="onnxruntime")
    except UsageError:  # every graph is for another engine
        yield from provider_states(available, this_device())
        return
    yield from provider_states(
        available,
        this_device(),
        inputs=graph.inputs,
        profile=make_profile(bundle.manifest, graph.inputs),
        cache=cache_folder(bundle.sha256, graph.file),
    )


def _tensorrt(bundle: Bundle, graph: str | None, *, rebuild: bool = False) -> Session:
    from mope_deploy.engines.tensorrt.device import this_device

    for name in _libraries():
        bundle.graph(graph, engine=name)  # a name that is not there, or one for another engine
    built = built_engines(bundle, graph)
    if not built and not rebuild:
        libraries = [name for name in _libraries() if _is_installed(name)]
        without_gpu = this_device().no_gpu is not None
        raise EngineError(
            ("no TensorRT engine was built" if libraries else "no TensorRT is installed")
            + (", and no GPU is here" if without_gpu else ""),
            todo=f"run: mope build {bundle.path}" if libraries and not without_gpu else None,
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
        files: where the engine is, from :func:`mope_deploy.engines.tensorrt.build.build_engine` or :func:`built_engines`.

    Raises:
        UsageError: no such graph, or one for another engine.
        MissingExtraError: the library is not installed.
        EngineError: the first check that fails.
        ParityError: the golden samples do not come out.
    """
    from mope_deploy.engines.tensorrt.backends import open_backend
    from mope_deploy.engines.tensorrt.device import this_device
    from mope_deploy.engines.tensorrt.session import open_engine

    chosen = bundle.graph(graph, engine=backend)
    return open_engine(bundle, chosen, files, open_backend(backend), this_device())


def _rebuild(bundle: Bundle, graph: str | None, built: Sequence[tuple[str, EngineFiles]]) -> tuple[str, EngineFiles]:
    """Build with the sizes and options of the engine that was there, as far as its sidecar can be read."""
    from mope_deploy.engines.tensorrt.build import build_engine
    from mope_deploy.engines.tensorrt.sidecar import Sidecar

    options: dict[str, Any] = {}
    for name, files in built:
        try:
            old = Sidecar.read(files.sidecar)
        except EngineError:
            continue
        options = {axis: str(sizes) for axis, sizes in old.profile.items()}
        options |= {"backend": name if _is_installed(name) else None, "tf32": old.precision.tf32}
        options["workspace"] = None if old.workspace is None else old.workspace // 2**20 or None
        break
    sidecar, made = build_engine(bundle, graph=graph, **options)
    return sidecar.backend, made


def built_engines(bundle: Bundle, graph: str | None) -> list[tuple[str, EngineFiles]]:
    """Every TensorRT engine of a graph, good or not, with its library, in the order in which they are tried."""
    from mope_deploy.engines.tensorrt.sidecar import find_engines

    found = []
    for name in _libraries():
        try:
            chosen = bundle.graph(graph, engine=name)
        except UsageError:  # a graph for another engine
            continue
        found += [(library, files) for library, files in find_engines(bundle, chosen) if library == name]
    return sorted(found, key=lambda one: one[1].exported)  # those built on the device first


def engines_not_run(bundle: Bundle, sessions: Iterable[Session], graphs: Sequence[str]) -> dict[str, str]:
    """TensorRT engines of some graphs, built here or exported, that no session runs: the file → why not.

    Args:
        bundle: whose engines.
        sessions: those that are open.
        graphs: names.
    """
    from mope_deploy.engines.tensorrt.backends import open_backend
    from mope_deploy.engines.tensorrt.device import this_device
    from mope_deploy.engines.tensorrt.session import check_engine
    from mope_deploy.engines.tensorrt.sidecar import Sidecar, find_engines

    running = {files.engine for one in sessions if (files := getattr(one, "files", None)) is not None}
    found = {}
    for graph in (one for one in bundle.manifest.graphs if one.name in graphs):
        for library, files in find_engines(bundle, graph):
            if files.engine in running:
                continue
            try:
                backend = open_backend(library)
                check_engine(Sidecar.read(files.sidecar), files, bundle, graph, backend, this_device())
                found[str(files.engine)] = "another engine was chosen"
            except MopeError as error:
                found[str(files.engine)] = str(error)
    return found


def _libraries() -> tuple[str, ...]:
    from mope_deploy.engines.tensorrt.backends import BACKENDS

    return tuple(BACKENDS)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
