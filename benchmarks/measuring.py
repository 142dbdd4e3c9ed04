"""Timing graphs and modules against each other: one process, in turn, warm, so many threads and none spinning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.settings import Settings
from mope_deploy.bench.timing import interleave, ratio_of_medians, summary, warm_up
from mope_deploy.console import err

__all__ = ["compare", "eager_call", "graph_call", "open_graph"]

_WARM_UP = 3


def open_graph(path: Path, settings: Settings, *, profile: Path | None = None) -> ort.InferenceSession:
    """ONNX Runtime on the CPU; ``profile`` is the prefix of a file that it writes where time went."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.use_device_allocator_for_initializers", "1"
    )  # as mope_deploy.engines.onnxruntime.session
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def graph_call(session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
    """One call of a graph for its logits."""
    given = dict(feeds)
    return lambda: session.run(["logits"], given)


def eager_call(module: nn.Module, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
    """One call of a module."""
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def call() -> object:
        with torch.inference_mode():
            return module(tensors)

    return call


def compare(
    calls: Mapping[str, Callable[[], object]], settings: Settings, *, samples: Mapping[str, int] | int, base: str = ""
) -> dict[str, dict[str, Any]]:
    """Time calls against each other.

    Args:
        calls: by name.
        settings: for how long.
        samples: in each call, by name or of all.
        base: of ratios; by default the first call.

    Returns:
        Name → the summary of :mod:`mope_deploy.bench.timing` and ``ratio``, to ``base``.
    """
    torch.set_num_threads(settings.threads)
    err.print(f"measuring {', '.join(calls)}", markup=False)
    warm_up(calls, calls_each=min(_WARM_UP, settings.rounds))
    times = interleave(calls, seconds=settings.seconds, rounds=settings.rounds)
    base = base or next(iter(calls))
    return {
        name: summary(found, samples=samples if isinstance(samples, int) else samples[name])
        | {"ratio": ratio_of_medians(found, times[base]).to_dict()}
        for name, found in times.items()
    }
