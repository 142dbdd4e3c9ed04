"""``mope-export --dry-run``: everything that would be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.cli.show import print_rows, size
from export.limits import GOLDEN_COUNT
from export.options import Options
from export.source import Source
from mope_deploy.console import out

if TYPE_CHECKING:
    from mope_deploy.model import MoPE

__all__ = ["print_plan"]


def print_plan(
    source: Source, model: MoPE, target: Path, options: Options, formats: Sequence[str], calibration: Path
) -> None:
    from export.gate.cases import generated_cases, rows_needed
    from export.graph.exporter_config import exporter_config
    from export.graph.static import folding_of

    config = model.config
    described = exporter_config(model, routing_output=options.routing)
    conditioned = " and ".join(spec.modality for spec in config.complementary)
    routing = f"top-{config.top_k}" if config.top_k else "dense"
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    generated = sum(case.batch for case in generated_cases(described.graph, seed=options.seed))
    real = options.samples or rows_needed(len(config.labels))
    print_rows(
        {
            "model": f"{source.checkpoint}: {config.main.modality} conditioned by {conditioned}, "
            f"L = {config.prompt_length}, K = {config.experts}, {routing} routing, {len(config.labels)} labels",
            "inputs": _tensors(described.input_shapes),
            "outputs": _tensors(described.output_shapes),
            "graph": f"opset {options.opset}, about {size(weights)} in fp32"
            + (", and a variant fused for ONNX Runtime" if options.fuse else ""),
            "prompts": folding_of(model, options.fold),
            **({"files": f"a main file, and one of {conditioned}"} if options.split else {}),
            "formats": f"{', '.join(formats)} in {', '.join(options.precisions)}"
            + (f" for {options.target}" if options.target else ""),
            **_lowered(source, options, weights, calibration),
            "comparison": f"{generated} generated samples and up to {real} of {source.data}",
            "golden": f"up to {GOLDEN_COUNT} samples of {source.data} go into the bundle, pictures and texts included",
            "bundle": f"{target}, called {options.name!r}" + _replacing(target, overwrite=options.overwrite),
        }
    )
    out.print("dry run: nothing was written", markup=False)


def _lowered(source: Source, options: Options, weights: int, calibration: Path) -> dict[str, str]:
    """How precisions below fp32 will be made and judged, each in a row."""
    from export.gate import THRESHOLDS

    rows = {}
    for precision in options.precisions:
        if precision == "fp32":
            continue
        least = size(weights // (2 if precision in ("fp16", "bf16") else 4))
        limits = replace(THRESHOLDS[precision], **options.thresholds)
        asked = ", ".join(f"{name} {share:g}" for name, share in limits.to_dict().items())
        ranges = (
            f"; ranges of up to {options.calibration_samples:,} of {calibration} ({options.calibration_method}), "
            "rows that are not judged"
            if precision == "int8"
            else ""
        )
        rows[precision] = (
            f"{least} or more, with what is kept in fp32; judged on up to {options.gate_samples:,} of {source.data}: "
            f"{asked}{ranges}"
        )
    return rows


def _replacing(target: Path, *, overwrite: bool) -> str:
    if not target.exists():
        return ""
    return ", replacing what is there" if overwrite else ", which is there already: --overwrite would be needed"


def _tensors(shapes: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, (_, shape) in shapes.items())
