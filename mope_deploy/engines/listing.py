"""The TensorRT engines of a bundle: which were built, and which are not run and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mope_deploy.bundle import Bundle
from mope_deploy.engines.session import Session
from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.pair import settle
from mope_deploy.engines.tensorrt.session import check_engine
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar, find_engines
from mope_deploy.errors import MopeError, UsageError

__all__ = ["built_engines", "engines_not_run"]


def built_engines(bundle: Bundle, graph: str | None) -> list[tuple[str, EngineFiles]]:
    """Every TensorRT engine of a graph, good or not, with its library, in the order in which they are tried."""
    try:
        chosen = bundle.graph(graph, engine="tensorrt")  # all its libraries take the same graphs
    except UsageError:  # a graph for another engine
        return []
    found = find_engines(bundle, chosen)
    for _, files in found:
        if not files.exported:
            settle(files)
    return found


def engines_not_run(bundle: Bundle, sessions: Iterable[Session], graphs: Sequence[str]) -> dict[str, str]:
    """TensorRT engines of these graphs, built here or exported, that none of the open sessions runs: file → why not."""
    running = {files.engine for one in sessions if (files := getattr(one, "files", None)) is not None}
    found = {}
    for graph in (one for one in bundle.manifest.graphs if one.name in graphs):
        for library, files in built_engines(bundle, graph.name):
            if files.engine in running:
                continue
            try:
                backend = open_backend(library)
                check_engine(Sidecar.read(files.sidecar), files, bundle, graph, backend, this_device())
                found[str(files.engine)] = "another engine was chosen"
            except MopeError as error:
                found[str(files.engine)] = str(error)
    return found
