"""The last word: the very files that go into the bundle, after all that was cut, fused, dropped or lowered.

fp32 files pass the parity gate as they are. Of lower precisions the gate judged one whole file; whatever was made of it
since, or beside it, is held against that file: weights and nodes by name and exactly, outputs on real samples.
Their hashes are written down, and nothing else is packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.gate.cases import Case
from export.gate.device import run_checked
from export.gate.evaluation import Evaluation
from export.gate.found import json_safe
from export.gate.lowered_report import PrecisionReport
from export.gate.measure import measure_precision, without_routing
from export.gate.reference import Batch
from export.gate.thresholds import Thresholds
from export.graph.exporter_config import MoPEExporterConfig
from export.graph.files import read
from export.graph.operators import MOVING_OPS
from mope_deploy.errors import ExportError, ParityError
from mope_deploy.files import sha256
from mope_deploy.model import MoPE

__all__ = ["Final", "JudgedFile", "changed", "check_judged", "hashes", "near"]

# How export/graph/split calls a value on its way from a part to the main file.
_CROSSED = re.compile(r"(_row|_given|_half|_float32|_computed|_$)+(?=\.|$)")
_LEAST, _MOST = 64, 192  # samples that two files are compared on
_SAME = 0.9  # of these samples: one in 64 is more than the gate allows of a thousand
_LARGE = 16  # elements from which on a weight has to be found again


@dataclass(frozen=True)
class Final:
    """What was judged last, and how.

    Attributes:
        sha256: of every file of the graph, by name: nothing else may be packed.
        how: in words.
        reports: of lower precisions what the files compute, against the file that the gate judged; none where they are
            that file.
    """

    sha256: Mapping[str, str]
    how: str
    reports: tuple[PrecisionReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        shown = [
            {
                "reference": report.reference,
                "mark": report.mark,
                "samples": report.samples,
                "passed": report.passed,
                "logits_rms_of_spread": report.logits.spread,
                "probabilities_max_error": report.probabilities.maximum,
                "labels_equal": report.labels.equal,
            }
            for report in self.reports
        ]
        return json_safe({"sha256": dict(self.sha256), "how": self.how, "comparisons": shown})


def hashes(files: Sequence[Path]) -> dict[str, str]:
    """The hash of every file by its name."""
    return {path.name: sha256(path) for path in files}


def check_judged(final: Final | None, files: Sequence[Path]) -> None:
    """The files are those that were judged last, to the byte.

    Raises:
        ExportError: naming one that is not.
    """
    if final is None:
        raise ExportError(f"{files[0].name} was never judged", expected="the last gate before it is packed")
    for name, found in hashes(files).items():
        if found != final.sha256.get(name):
            raise ExportError(
                f"{name} is not the file that was judged", received=found, expected=final.sha256.get(name)
            )


def near(thresholds: Thresholds, config: MoPEExporterConfig, model: MoPE) -> Thresholds:
    """How near a file of lower precision has to be to the one that was judged.

    No farther than that one may be from the model: both round the same weights, and where one rounds an activation that
    the other does not, it errs by what lower precision is allowed to. Labels are not counted: on few samples one
    near-tie would be too many, and what flips has probabilities that near. Nor is a top expert in ten; and where
    experts are selected out of sight, so that no value is judged, a label in ten.

    Args:
        thresholds: what the judged file had to reach.
        config: what the file was asked to be.
        model: that it is of.
    """
    routing = None if thresholds.routing is None else min(_SAME, thresholds.routing)
    asked = replace(thresholds, labels=0.0, routing=routing, metric=None)
    if "routing" in config.outputs:
        return asked
    asked = without_routing(asked, model)
    return asked if asked.logits is not None else replace(asked, labels=min(_SAME, thresholds.labels))


class JudgedFile:
    """Real samples and what the file that passed the gate computes for them, in the place of the model's outputs.

    The samples are such that every label and expert shows that the model gives or selects on any, within a limit.

    Args:
        evaluation: of the gate that the file passed.
        file: it, whole.
        config: of the file.
        precision: of the file.

    Raises:
        ParityError: the file does not run.
    """

    def __init__(self, evaluation: Evaluation, file: Path, config: MoPEExporterConfig, *, precision: str) -> None:
        self.model, self.cpu = evaluation.model, evaluation.cpu
        starts = evaluation.covering(least=_LEAST, most=_MOST)
        batches = evaluation.batches(only=starts, what=file.name)
        runs, opened, ran = run_checked(file, config, batches, precision=precision, cpu=self.cpu)
        if not runs:
            raise ParityError(f"{file.name} was judged and does not run", received=str([*opened, *ran][-1:]))
        self._runs = [(run.case, dict(run.exported)) for run in runs]
        self._rows = [row for start in starts for row in evaluation.rows(start)]
        self._name = evaluation.name
        self.labelled = np.zeros(len(self._rows), bool)
        self.truth = evaluation.truth[self._rows]

    def name(self, row: int) -> str:
        return self._name(self._rows[row])

    def batches(self, *, what: str = "a file") -> Iterator[Batch]:
        del what
        for case, outputs in self._runs:
            soft = {"soft": outputs["routing"]} if "routing" in outputs else {}
            yield Batch(Case(case.name, case.source, case.inputs), outputs | soft)

    def compare(
        self,
        file: Path,
        config: MoPEExporterConfig,
        *,
        parts: Sequence[Path],
        precision: str,
        asked: Thresholds,
        mark: str,
    ) -> PrecisionReport:
        """What ``file``, or a graph in parts, computes on the same samples; never raises for a wrong one."""
        found = measure_precision(self, file, config, precision=precision, thresholds=asked, mark=mark, parts=parts)
        return replace(found, reference="the file that was judged")


def changed(files: Sequence[Path], judged: Path) -> list[str]:
    """What a graph in one or more files has otherwise than the judged file: weights by name, nodes by their outputs.

    Not every weight shows on every sample: an expert that none selects is compared here alone. Weights are equal bit
    for bit, nodes in operator, attributes and what they read. A graph in parts also moves what it hands over.
    """
    weights, nodes = _weights(judged), _nodes(judged)
    found = []
    for file in files:
        for name, tensor in _weights(file).items():
            other = weights.get(name)
            if (other is None and tensor.size >= _LARGE) or (other is not None and not _equal(tensor, other)):
                found.append(name)
        for name, node in _nodes(file).items():
            moves = node.operator in (*MOVING_OPS, "Cast")
            if node != nodes.get(name) and not (moves and (name not in nodes or node.by_split)):
                found.append(name)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Node:
    """What computes one tensor."""

    operator: str
    domain: str
    attributes: tuple[str, ...]
    inputs: tuple[str, ...]
    by_split: bool = field(compare=False)


def _nodes(file: Path) -> dict[str, _Node]:
    """By the name of each output; inputs under the names they had before they crossed from a part to the main file."""
    found = {}
    for node in read(file).graph:
        # The batch size is read off whichever input a file has.
        names = [value.name if value is not None else None for value in node.inputs if node.op_type != "Shape"]
        inputs = tuple(_CROSSED.sub("", name or "") for name in names)
        attributes = tuple(sorted(f"{name} {attribute.value}" for name, attribute in node.attributes.items()))
        by_split = (node.name or "").startswith("split/")
        for i, value in enumerate(node.outputs):
            found[value.name or ""] = _Node(f"{node.op_type}", node.domain, (*attributes, str(i)), inputs, by_split)
    return found


def _weights(file: Path) -> dict[str, ir.TensorProtocol]:
    values = read(file).graph.initializers.items()
    return {name: value.const_value for name, value in values if value.const_value is not None}


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
