"""Everything that a bundle of judged graphs holds but for engines: the files, and the manifest that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.gate.device import open_files
from export.limits import GOLDEN_COUNT
from export.pack.golden import Golden, golden_samples, make_golden
from export.pack.manifest import REPORT, TOKENIZER, graph_entry, manifest_of, reports_of
from export.variants import Variant, Work
from mope_deploy.files import json_bytes

__all__ = ["Contents", "contents_of"]


@dataclass(frozen=True)
class Contents:
    """What :func:`mope_deploy.bundle.write_bundle` is given.

    Attributes:
        files: name inside the bundle → a file to copy, or its bytes.
        manifest: without files and digest.
        golden: the golden samples, which are among the files.
    """

    files: dict[str, Path | bytes]
    manifest: dict[str, Any]
    golden: Golden


def contents_of(work: Work, variants: Sequence[Variant]) -> Contents:
    """Choose golden samples, and put everything together. Each graph of lower precision is opened once for both.

    Raises:
        ParityError: a graph that golden samples could not check.
        ExportError: golden samples that prove nothing.
    """
    model = work.model
    lowered = {
        variant.name: open_files(variant.runnable, work.final, precision=variant.precision, cpu=work.cpu)
        for variant in variants
        if variant.lowered is not None
    }
    chosen = golden_samples(model, work.samples, GOLDEN_COUNT, lowered=list(lowered.values()))
    golden = make_golden(model, chosen, outputs=work.final.outputs)
    graphs = [graph_entry(work, variant, golden, lowered.get(variant.name)) for variant in variants]
    files: dict[str, Path | bytes] = {path.name: path for variant in variants for path in variant.all_files}
    files |= golden.files | {REPORT: json_bytes(reports_of(work, variants))}
    if model.preprocessing.tokenizer is not None:
        files[TOKENIZER] = model.preprocessing.tokenizer.encode("utf-8")
    return Contents(files, manifest_of(work, variants, graphs), golden)
