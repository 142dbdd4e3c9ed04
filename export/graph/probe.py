"""Values inside a graph, which no device asks for.

The one place in ``export/`` that opens ONNX Runtime itself: its sessions behind :mod:`mope_deploy.engines` give what a
graph has as outputs, of dtypes and shapes known beforehand. Everything that is judged runs in those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mope_deploy.engines.onnxruntime.library import import_onnxruntime

__all__ = ["open_probe"]


def open_probe(file: Path) -> Any:
    """A graph that was given inner values as its outputs, on the CPU; raises whatever ONNX Runtime raises."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # every error is raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads starve busy machines
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
