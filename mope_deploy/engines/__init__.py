"""Inference engines: one session protocol (session.py), one file per engine, chosen by name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mope_deploy.bundle import Bundle
from mope_deploy.engines.session import Session
from mope_deploy.errors import UsageError
from mope_deploy.fields import nearest

__all__ = ["ENGINES", "Session", "open_session"]

ENGINES = ("onnxruntime",)


def open_session(
    bundle: Bundle,
    *,
    engine: str = "auto",
    graph: str | None = None,
    threads: int | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
) -> Session:
    """Load a graph of ``bundle`` into an engine.

    Args:
        bundle: where the graph is.
        engine: a name of :data:`ENGINES`, or ``"auto"``.
        graph: its name; by default the canonical one.
        threads, providers: see :class:`mope_deploy.engines.ort.OnnxRuntimeSession`.

    Raises:
        UsageError: no such engine or graph.
        MissingExtraError: the engine's package is not installed.
        EngineError: the engine refuses the graph.
    """
    if engine not in ("auto", *ENGINES):
        hint = nearest(engine, ENGINES)
        raise UsageError(
            "engine",
            received=repr(engine),
            expected=f"auto or {', '.join(ENGINES)}",
            todo=f"did you mean {hint!r}?" if hint else None,
        )
    from mope_deploy.engines.ort import OnnxRuntimeSession

    chosen = bundle.graph(graph, engine="onnxruntime")
    return OnnxRuntimeSession(bundle.file(chosen.file), chosen, threads=threads, providers=providers)
