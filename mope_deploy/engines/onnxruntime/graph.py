"""A graph's files in ONNX Runtime as one session, whether they lie in a bundle or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mope_deploy.engines.cache import RowCache
from mope_deploy.engines.onnxruntime.cpu import CpuSettings
from mope_deploy.engines.onnxruntime.providers import Providers
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from mope_deploy.engines.session import Session
from mope_deploy.engines.split import SplitSession
from mope_deploy.manifest import Graph

__all__ = ["open_graph"]


def open_graph(
    graph: Graph,
    file: Callable[[str], Path],
    *,
    cpu: CpuSettings | None = None,
    providers: Providers | None = None,
    cache_mb: int = 0,
    takes_turns: bool = False,
) -> Session:
    """Open a graph in one file, or its main file and parts.

    Args:
        file: path of each file that the graph names: :meth:`Bundle.file`, or ``folder.joinpath`` before there is one.
        graph, cpu, providers, takes_turns: as of :class:`OnnxRuntimeSession`, and so is what is raised; the files of a
            graph in parts take turns in any case.
        cache_mb: see :func:`mope_deploy.engines.open_session`.
    """
    if not graph.parts:
        return OnnxRuntimeSession(file(graph.file), graph, cpu=cpu, providers=providers, takes_turns=takes_turns)

    def one(described: Graph) -> Session:
        return OnnxRuntimeSession(file(described.file), described, cpu=cpu, providers=providers, takes_turns=True)

    parts = {
        p.modality: one(replace(graph, file=p.file, data=p.data, inputs=p.inputs, outputs=p.outputs, parts=()))
        for p in graph.parts
    }
    return SplitSession(graph, one(graph), parts, cache=RowCache(limit=cache_mb * 2**20) if cache_mb else None)
