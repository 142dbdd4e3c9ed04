"""Graphs run in ONNX Runtime as plainly as can be, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.graph.probe import open_probe


def run_files(file: Path, feeds: Mapping[str, Any], parts: Sequence[Path] = ()) -> dict[str, np.ndarray]:
    """All outputs of a graph, and of the parts before it whose outputs it reads; feeds that nothing reads are left."""
    known = dict(feeds)
    for path in (*parts, file):
        session = open_probe(path)
        names = [tensor.name for tensor in session.get_outputs()]
        given = {tensor.name: known[tensor.name] for tensor in session.get_inputs()}
        known |= dict(zip(names, session.run(names, given), strict=True))
    return {name: known[name] for name in names}
