"""Main memory of a process that runs one graph: after loading it, and at most."""

from __future__ import annotations

import msgspec
import numpy as np

from benchmarks.child import run_child
from benchmarks.graphs import Workshop
from benchmarks.measuring import describe_graph
from benchmarks.result import Result, Table
from benchmarks.settings import Spec

__all__ = ["memory"]

_CODE = """
import json, sys
from pathlib import Path
import msgspec, numpy as np
from mope_deploy.bench.board import peak_memory, resident_memory
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession, library_version
from mope_deploy.manifest import Graph
file, described, arrays, threads = sys.argv[1:]
graph, cpu = msgspec.json.decode(described, type=Graph), cpu_settings(threads=int(threads), spinning=False)
feeds = dict(np.load(arrays))
library_version()  # which imports it
before = resident_memory()
session = OnnxRuntimeSession(Path(file), graph, cpu=cpu)
loaded = resident_memory()
for _ in range(3):
    session.run(feeds, ("logits",))
print(json.dumps({"before": before, "loaded": loaded, "peak": peak_memory()}))
"""


def memory(workshop: Workshop) -> Result:
    """MoPE and the bare pair, in fp32 and dynamic int8, at batch 1 and 8, each in a process of its own."""
    settings, rows = workshop.settings, []
    for precision in ("fp32", "int8-dynamic"):
        for kind, name in (("bare", "bare pair"), ("mope", "MoPE")):
            spec = Spec(kind=kind, precision=precision)
            path = workshop.graph(spec)
            described = msgspec.json.encode(describe_graph(path, precision)).decode()
            for batch in (1,) if settings.few else (1, 8):
                arrays = settings.folder / f"feeds-{batch}.npz"
                np.savez(arrays, **workshop.feeds(spec, batch=batch))  # type: ignore[arg-type]
                found = run_child(_CODE, path, described, arrays, settings.threads, threads=settings.threads)
                mebibytes = (f"{(found[key] - found['before']) / 2**20:,.0f}" for key in ("loaded", "peak"))
                rows.append((name, precision, batch, f"{path.stat().st_size / 2**20:,.0f}", *mebibytes))
    return Result(
        about="A process that loads one graph in ONNX Runtime as a device does and runs it three times, beyond what it "
        f"had with its libraries imported; {settings.encoders.names['vit']}, {settings.form} form.",
        tables=(Table("memory", ("graph", "precision", "batch", "file MiB", "loaded MiB", "peak MiB"), tuple(rows)),),
    )
