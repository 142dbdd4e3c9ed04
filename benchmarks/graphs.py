"""The graphs that are measured, exported by the project's own exporter: MoPE, its bare encoders, its main part alone.

Every kind goes through ``export.graph.to_onnx`` and ``export.precision``, so that no ratio compares two exporters.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import export
import mope_deploy
from benchmarks.encoders import BarePair, Encoders
from benchmarks.measuring import Feeds, describe_graph, eager_call, open_graph
from benchmarks.settings import TEXT_LENGTH, Settings, Size, Spec
from export.graph.exporter_config import EXAMPLE_BATCH, EXAMPLE_LENGTH, exporter_config
from export.graph.files import save
from export.graph.split import split
from export.graph.static import to_static
from export.graph.to_onnx import trace
from export.precision import lowering
from export.precision.check import DYNAMIC_OPS
from mope_deploy.console import err
from mope_deploy.files import whole_file
from mope_deploy.manifest import conditions_name
from mope_deploy.model import MoPE

__all__ = ["Workshop", "make_feeds"]

_INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
_AXES = {"input_ids": {0: "batch", 1: "text_length"}, "attention_mask": {0: "batch", 1: "text_length"}}
_CALIBRATION = (2, 2)  # batches, samples in each: ranges of random weights have no meaning, only their number counts
_VERSIONS = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


class Workshop:
    """Makes graphs, each once; those of an earlier run in the folder are used if nothing that made them changed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.encoders = Encoders(settings.encoders)
        self._state = _state_of_the_code()

    def graph(self, spec: Spec) -> Path:
        """The ONNX file.

        Raises:
            ExportError: the exporter failed.
        """
        key = hashlib.sha256(f"{self._state} {self.settings.size} {self.settings.form}".encode()).hexdigest()[:12]
        path = self.settings.folder / f"{spec.name}-{self.settings.size}-{self.settings.form}-{key}.onnx"
        if not path.is_file():
            err.print(f"exporting {spec.name}", markup=False)
            with whole_file(path) as temporary:
                if spec.kind == "given-y":
                    self._split(self.graph(replace(spec, kind="mope")), spec, temporary)
                elif spec.precision == "fp32":
                    self._export(spec, temporary)
                else:
                    self._lower(self.graph(replace(spec, precision="fp32")), spec, temporary)
        return path

    def open(self, spec: Spec) -> Callable[[Feeds], object]:
        """What runs the graph, or the eager module, on :meth:`feeds`. Raises as :meth:`graph`."""
        if spec.eager:
            return eager_call(self.model(spec).eval())
        return open_graph(self.graph(spec), self.settings, precision=spec.precision)

    def model(self, spec: Spec) -> nn.Module:
        """The eager module that the graph is exported from, the same values each time: a MoPE, or bare encoders."""
        if spec.kind in ("mope", "given-y"):
            return self.encoders.mope(spec)
        sides = {"image": self.encoders.image(spec.image), "text": self.encoders.text}
        main = sides.pop(spec.main)
        torch.manual_seed(0)
        return BarePair(main, *(sides.values() if spec.kind == "bare" else ())).eval()

    def feeds(
        self, spec: Spec, *, batch: int, text_length: int = TEXT_LENGTH, seed: int = 0
    ) -> dict[str, NDArray[Any]]:
        """Arrays that the graph takes: random pixels and tokens, all of them real."""
        made = make_feeds(self.settings.encoders, batch=batch, text_length=text_length, seed=seed)
        names = [*_INPUTS[spec.main], *(_INPUTS[spec.complementary] if spec.kind in ("mope", "bare") else ())]
        feeds = {name: made[name] for name in names}
        if spec.kind == "given-y":
            given = conditions_name(spec.complementary)
            inputs = describe_graph(self.graph(spec), spec.precision).inputs
            (width,) = (int(tensor.shape[1]) for tensor in inputs if tensor.name == given)
            feeds[given] = np.random.default_rng(seed).standard_normal((batch, width), np.float32)
        return feeds

    def _export(self, spec: Spec, path: Path) -> None:
        module = self.model(spec)
        if isinstance(module, MoPE):
            static = to_static(module, fold="token" if self.settings.form == "token" else "auto")
            save(trace(static, exporter_config(module)), path)
            return
        feeds = self.feeds(spec, batch=EXAMPLE_BATCH, text_length=EXAMPLE_LENGTH)
        examples = {name: torch.from_numpy(array) for name, array in feeds.items()}
        described = SimpleNamespace(  # what trace asks of a description, for a module that is no whole MoPE
            inputs={name: dict(_AXES.get(name, {0: "batch"})) for name in feeds},
            outputs={"logits": {0: "batch"}},
            generate_dummy_inputs=lambda framework: examples,
        )
        save(trace(module, described), path)  # type: ignore[arg-type]

    def _lower(self, source: Path, spec: Spec, path: Path) -> None:
        calibration = None
        if spec.precision == "int8":
            batches, samples = _CALIBRATION
            calibration = (self.feeds(spec, batch=samples, seed=seed) for seed in range(batches))
        lowering(source, spec.precision, calibration=calibration).write(path)

    def _split(self, source: Path, spec: Spec, path: Path) -> None:
        """The main file of a graph in parts; the other one is not measured."""
        whole = replace(spec, kind="mope")
        probes = [self.feeds(whole, batch=batch, text_length=5 + batch) for batch in (1, 2)]
        dynamic = DYNAMIC_OPS if spec.precision == "int8-dynamic" else ()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            inputs = {spec.complementary: _INPUTS[spec.complementary]}
            cut = split(source, Path(folder), inputs, probes, extra_ops=dynamic)
            cut.main[0].replace(path)


def make_feeds(size: Size, *, batch: int, text_length: int = TEXT_LENGTH, seed: int = 0) -> dict[str, NDArray[Any]]:
    """All three inputs of a pair of encoders."""
    random = np.random.default_rng(seed)
    return {
        "pixel_values": random.standard_normal((batch, 3, size.image, size.image), np.float32),
        "input_ids": random.integers(4, size.bert["vocab_size"], (batch, text_length)),
        "attention_mask": np.ones((batch, text_length), np.int64),
    }


def _state_of_the_code() -> str:
    """Changes when anything does that decides what a graph looks like."""
    digest = hashlib.sha256(" ".join(f"{name}={version(name)}" for name in _VERSIONS).encode())
    here = [Path(__file__).with_name(name) for name in ("encoders.py", "graphs.py", "settings.py")]
    for package in (export, mope_deploy):
        here += sorted(Path(package.__path__[0]).rglob("*.py"))
    for file in here:
        digest.update(file.read_bytes())
    return digest.hexdigest()
