"""Where the time of the exported model goes, by operator, and how far it is from what this CPU could do at best.

The roofline: no graph can take less time than its floating-point operations at the rate of one large matrix product,
nor than reading its weights once at the rate of a large copy. Both rates are measured in the graphs' own rounds.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.graphs import Workshop
from benchmarks.measuring import compare, open_graph
from benchmarks.result import Result, Table
from benchmarks.settings import Spec
from mope_deploy.engines.onnxruntime.library import import_onnxruntime

__all__ = ["operators"]

_RUNS = 10
_SIDE = 1536  # of the matrices whose product shows the rate
_COPIED = 64 * 2**20  # float32 values, far more than any cache
_SHOWN = 12


def operators(workshop: Workshop) -> Result:
    """Shares of time by operator, MoPE beside the bare pair, and each one's distance to the roofline; batch 1."""
    settings = workshop.settings
    specs = {"bare pair": Spec(kind="bare"), "MoPE": Spec()}
    spent = {name: _profile(workshop, spec) for name, spec in specs.items()}
    names = [name for name, _ in sum(spent.values(), Counter()).most_common(_SHOWN)]
    shares = [_share(name, *(found[name] for found in spent.values())) for name in names]
    shares.append(_share("others", *(found.total() - sum(found[name] for name in names) for found in spent.values())))
    return Result(
        about=f"ONNX Runtime's own profile, medians of {_RUNS} runs, batch 1, {settings.encoders.names['vit']}, "
        f"{settings.form} form; and the time of a run against the least that arithmetic and weights could take here.",
        tables=(
            Table("time by operator", ("operator", *(f"{name} ms" for name in specs), "difference ms"), tuple(shares)),
            _roofline(workshop, specs),
        ),
    )


def _share(name: str, bare: float, mope: float) -> tuple[str, ...]:
    return name, f"{bare / 1e3:.3f}", f"{mope / 1e3:.3f}", f"{(mope - bare) / 1e3:+.3f}"


def _profile(workshop: Workshop, spec: Spec) -> Counter[str]:
    """Operator → microseconds in one run, the median of several."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()  # those of benchmarks.measuring's sessions, which cannot be asked for a profile
    options.intra_op_num_threads, options.log_severity_level = workshop.settings.threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_profiling, options.profile_file_prefix = True, str(workshop.settings.folder / f"profile-{spec.name}")
    session = ort.InferenceSession(str(workshop.graph(spec)), options, providers=["CPUExecutionProvider"])
    feeds = workshop.feeds(spec, batch=1)
    for _ in range(1 + _RUNS):
        session.run(["logits"], feeds)
    file = Path(session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    each = len(kernels) // (1 + _RUNS)
    runs = []
    for start in range(each, len(kernels), each):  # without the first, which warms up
        spent: Counter[str] = Counter()
        for event in kernels[start : start + each]:
            spent[event["args"]["op_name"]] += event["dur"]
        runs.append(spent)
    return Counter({name: statistics.median(run[name] for run in runs) for name in runs[0]})


def _roofline(workshop: Workshop, specs: dict[str, Spec]) -> Table:
    settings = workshop.settings
    product = settings.folder / "product.onnx"
    onnx.save(_product(), product)
    random = np.random.default_rng(0)
    sides = {name: random.standard_normal((_SIDE, _SIDE), np.float32) for name in "ab"}
    large, copied = np.ones(_COPIED, np.float32), np.empty(_COPIED, np.float32)
    feeds = {name: workshop.feeds(spec, batch=1) for name, spec in specs.items()}
    calls: dict[str, Callable[[], object]] = {
        name: partial(workshop.open(spec), feeds[name]) for name, spec in specs.items()
    }
    calls["product"] = partial(open_graph(product, settings), sides)
    calls["copy"] = partial(np.copyto, copied, large)
    found = compare(calls, settings, samples=1)
    rate = 2 * _SIDE**3 / found["product"]["p50_ms"] * 1e3  # operations a second
    reading = 2 * large.nbytes / found["copy"]["p50_ms"] * 1e3  # bytes a second; a copy reads and writes
    # Of the table of word embeddings only a few rows are read.
    table = 4 * settings.encoders.bert["vocab_size"] * settings.encoders.bert["hidden_size"]
    rows = []
    for name, spec in specs.items():
        module = workshop.model(spec).eval().requires_grad_(False)  # what it trains needs a graph of gradients to count
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module({key: torch.from_numpy(array) for key, array in feeds[name].items()})
        operations, weights = counter.get_total_flops(), workshop.graph(spec).stat().st_size - table
        times = [operations / rate * 1e3, weights / reading * 1e3, found[name]["p50_ms"]]
        shown = (f"{time:.2f}" for time in (*times, times[2] / max(times[:2])))
        rows.append((name, f"{operations / 1e9:,.2f}", f"{weights / 1e6:,.1f}", *shown))
    return Table(
        f"roofline: {rate / 1e9:,.0f} GFLOP/s, {reading / 1e9:,.1f} GB/s",
        ("graph", "GFLOP", "weights MB", "computing ms", "reading ms", "p50 ms", "÷ roofline"),
        tuple(rows),
    )


def _product() -> onnx.ModelProto:
    """C = A·B of large matrices, neither of them constant."""
    shape = [_SIDE, _SIDE]
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b", "logits"))
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["logits"])], "product", [a, b], [c])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
