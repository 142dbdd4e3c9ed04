"""Graphs in parts (``--split``): every finished graph cut; :mod:`export.final` judges the files that a device runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from export.gate.device import open_files
from export.gate.reference import largest_difference
from export.graph.split import SplitGraph, part_inputs, split
from export.precision.check import DYNAMIC_OPS
from export.variants import Variant, Work

__all__ = ["in_parts"]


def in_parts(work: Work, variants: Sequence[Variant]) -> list[Variant]:
    """Every graph as a part for each complementary modality and a main file, which together compute the same.

    Raises:
        ExportError: a graph cannot be cut.
    """
    probes = [case.inputs for case in work.parity.cases if case.source == "generated"][:3]  # two text lengths at least
    cuts: dict[str, SplitGraph] = {}
    for variant in variants:
        work.on_step(f"cutting {variant.files[0].name}")
        whole = variant.files[0]
        cuts[variant.name] = split(
            whole,
            whole.parent / "split",
            part_inputs(work.model),
            probes,
            external=work.options.fuse and variant.name == "model",
            extra_ops=DYNAMIC_OPS if variant.precision == "int8-dynamic" else (),
            weights_of=(whole.with_name("model.onnx"), cuts["model"]) if variant.name == "model-fused" else None,
        )
    return [_cut(work, variant, cuts[variant.name]) for variant in variants]


def _cut(work: Work, whole: Variant, cut: SplitGraph) -> Variant:
    return replace(
        whole,
        files=cut.main,
        parts=cut.parts,
        runs_on="onnxruntime",
        split_error=_difference(work, whole, cut),
        compared={},
    )


def _difference(work: Work, whole: Variant, cut: SplitGraph) -> float:
    """max|a − b| / max|b| between a graph in parts and the whole one, over all batches and the worst output."""
    sessions = [
        open_files(file, work.final, parts, precision=whole.precision, cpu=work.cpu)
        for file, parts in ((cut.main[0], cut.part_files), (whole.files[0], ()))
    ]
    names = list(work.final.outputs)
    errors, scales = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for case in work.parity.cases:
        a, b = (session.run(case.inputs) for session in sessions)
        for name in names:
            errors[name] = max(errors[name], largest_difference(a[name], b[name]))
            scales[name] = max(scales[name], float(np.abs(b[name]).max(initial=0.0)))
    return max(errors[name] / scales[name] if scales[name] > 0 else errors[name] for name in names)
