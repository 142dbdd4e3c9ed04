"""Arguments and options that several commands share, each written down once."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mope_deploy.cli.printing import tell
from mope_deploy.errors import UsageError
from mope_deploy.limits import MAX_CACHE_MB

if TYPE_CHECKING:
    from mope_deploy.predictor import Predictor

__all__ = [
    "AsJson",
    "BatchSize",
    "BundleFolder",
    "EngineOptions",
    "Graph",
    "SkipBad",
    "check_output",
    "option",
    "takes_engine_options",
]


def option(words: str, *names: str, **more: Any) -> Any:
    """An option of a command, described in ``words``; its default is not shown unless asked for."""
    return typer.Option(*names, help=words, **{"show_default": False, **more})


BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)]
AsJson = Annotated[bool, option("Print JSON.", "--json")]
BatchSize = Annotated[int, option("Samples that run at once.", min=1, max=4096, show_default=True)]
SkipBad = Annotated[bool, option("Leave out rows that cannot be used, and list them at the end.", "--skip-bad")]

_ENGINE = "Inference engine: tensorrt, onnxruntime, or auto: TensorRT, then ONNX Runtime on CUDA, then on the CPU."
_GRAPH = "Which graph of the bundle; by default the canonical one."
_THREADS = "Threads of one operator; by default the bundle's choice, else the cores of this process."
_ARENA = "Keep the memory of earlier runs for the next one; by default the bundle's choice."
_PROVIDER = "ONNX Runtime's execution provider: cpu, cuda, or its full name. Repeatable."
_REBUILD = "Build the TensorRT engine again where there is none or this device refuses it."
_CACHE = "MiB for what a split graph need not compute again; others use none."

Graph = Annotated[str | None, option(_GRAPH)]


@dataclass(frozen=True)
class EngineOptions:
    """What can be said about the engine; :func:`mope_deploy.load` takes every field as a keyword of the same name."""

    engine: Annotated[str, option(_ENGINE, show_default=True)] = "auto"
    graph: Graph = None
    threads: Annotated[int | None, option(_THREADS, min=1)] = None
    arena: Annotated[bool | None, option(_ARENA, "--arena/--no-arena")] = None
    providers: Annotated[list[str] | None, option(_PROVIDER, "--provider")] = None
    rebuild: Annotated[bool, option(_REBUILD, "--rebuild")] = False
    cache_mb: Annotated[int, option(_CACHE, min=0, max=MAX_CACHE_MB, show_default=True)] = 64

    def load(self, bundle: Path, *, verify: bool = True, announce: bool = True) -> Predictor:
        """Open a bundle, and announce which engine runs, how it is set up and why, where the choice was left to us."""
        from mope_deploy.engines.onnxruntime.cpu import CpuSettings
        from mope_deploy.predictor import load

        predictor = load(bundle, verify=verify, **dataclasses.asdict(self))
        session = predictor.session
        if announce and session.why:
            set_up = f", {CpuSettings(**session.settings)}" if session.settings else ""
            tell(f"engine: {session.name} on {session.device}{set_up}: {session.why}")
        return predictor


def takes_engine_options(*, but: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with a parameter ``options: EngineOptions``: typer sees an option for each field in its place.

    ``but``: fields that the command does not offer.
    """
    types = get_type_hints(EngineOptions, include_extras=True)
    fields = [field for field in dataclasses.fields(EngineOptions) if field.name not in but]
    offered = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
        for f in fields
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(options=EngineOptions(**{field.name: given.pop(field.name) for field in fields}), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            mine = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += offered if parameter.name == "options" else [mine]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def check_output(option: str, file: Path | None) -> None:
    """Raise :class:`UsageError` for a file to write that is a folder, or in none: before anything is computed."""
    if file is None or (not file.is_dir() and file.absolute().parent.is_dir()):
        return
    why = os.strerror(errno.EISDIR if file.is_dir() else errno.ENOENT)
    raise UsageError(f"{option} {file} cannot be written", received=why, expected="a file to write")
