"""Main memory of a process that runs one graph: after loading it, and at most."""

from __future__ import annotations

import numpy as np

from benchmarks.child import run_child
from benchmarks.graphs import Spec, Workshop
from benchmarks.result import Result, Table

__all__ = ["memory"]

BATCHES = (1, 8)
_CODE = """
import json, sys
import numpy as np, onnxruntime as ort
from mope_deploy.bench.board import peak_memory, resident_memory
file, arrays, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
feeds = dict(np.load(arrays))
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
options.log_severity_level = 4
before = resident_memory()
session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
loaded = resident_memory()
for _ in range(3):
    session.run(["logits"], feeds)
print(json.dumps({"before": before, "loaded": loaded, "peak": peak_memory()}))
"""


def memory(workshop: Workshop) -> Result:
    """MoPE and the bare pair, in fp32 and dynamic int8, at batch 1 and 8, each in a process of its own."""
    settings, rows = workshop.settings, []
    for precision in ("fp32", "int8-dynamic"):
        for kind in ("bare", "mope"):
            spec = Spec(kind=kind, precision=precision)
            path = workshop.graph(spec)
            for batch in BATCHES[:1] if settings.few else BATCHES:
                arrays = settings.folder / f"feeds-{batch}.npz"
                np.savez(arrays, **workshop.feeds(spec, batch=batch))  # type: ignore[arg-type]
                found = run_child(_CODE, path, arrays, settings.threads, threads=settings.threads)
                mebibytes = (f"{(found[key] - found['before']) / 2**20:,.0f}" for key in ("loaded", "peak"))
                size = f"{path.stat().st_size / 2**20:,.0f}"
                rows.append(("MoPE" if kind == "mope" else "bare pair", precision, batch, size, *mebibytes))
    return Result(
        about="A process that loads one graph in ONNX Runtime and runs it three times, beyond what it had with its "
        f"libraries imported; {settings.encoders.names['vit']}, {settings.form} form.",
        tables=(Table("memory", ("graph", "precision", "batch", "file MiB", "loaded MiB", "peak MiB"), tuple(rows)),),
    )
