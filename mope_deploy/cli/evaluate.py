"""``mope eval``: predictions against the labels of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mope_deploy.cli.options import AsJson, BatchSize, BundleFolder, EngineOptions, SkipBad, takes_engine_options
from mope_deploy.cli.printing import print_json, print_rows, say
from mope_deploy.cli.rows import open_rows, predict_rows
from mope_deploy.errors import UsageError
from mope_deploy.files import write_file

__all__ = ["evaluate"]

_MOST_LABELS = 12  # of a confusion matrix that is shown
_MOST_LINES = 20  # labels that are shown one by one, and confusions of many labels


@takes_engine_options()
def evaluate(
    bundle: BundleFolder,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL with a row per sample: its inputs and label.")],
    as_json: AsJson = False,
    batch_size: BatchSize = 16,
    skip_bad: SkipBad = False,
    confusions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write every pair of true and predicted label with its count, as CSV."),
    ] = None,
    *,
    options: EngineOptions,
) -> None:
    """Compare predictions with the labels of a file: accuracy, macro and micro F1, confusion."""
    from mope_deploy.metrics import confusions_csv, report

    predictor = options.load(bundle)
    if confusions is not None and predictor.task.several:
        raise UsageError(
            "--confusions", received="a bundle with several labels a sample", expected="one label a sample"
        )
    samples = open_rows(predictor, data, require_label=True, skip_bad=skip_bad)
    pairs = [(row.label, one.label) for row, one in predict_rows(predictor, samples, batch_size=batch_size)]
    true, predicted = (predictor.task.encode(labels) for labels in zip(*pairs, strict=True))
    found = report(true, predicted, predictor.labels)
    if confusions is not None:
        write_file(confusions, confusions_csv(true, predicted, predictor.labels))
    found["skipped"] = len(samples.skipped)
    session = predictor.session
    found["engine"] = {"name": session.name, "device": session.device, "settings": session.settings}
    if predictor.cache is not None:
        found["cache"] = predictor.cache.to_dict()
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    say(
        f"{found['samples']:,} samples: accuracy {found['accuracy']:.4f}, "
        f"F1 macro {found['f1_macro']:.4f}, F1 micro {found['f1_micro']:.4f}"
    )
    classes = found["per_class"]
    most = sorted(classes.items(), key=lambda item: -item[1]["support"])[:_MOST_LINES]
    shown = classes.items() if len(classes) <= _MOST_LINES else most
    rows = ((label, f"{figures['f1']:.4f}", f"{figures['support']:,}") for label, figures in shown)
    print_rows(rows, header=("label", "F1", "samples"))
    if len(classes) > _MOST_LINES:
        say(f"these have the most samples; --json also has the other {len(classes) - _MOST_LINES:,} labels")
    cells = found.get("confusion_matrix")
    if cells is not None and len(classes) <= _MOST_LABELS:
        rows = ((label, *(f"{cell:,}" for cell in row)) for label, row in zip(classes, cells, strict=True))
        print_rows(rows, header=("", *classes), title="rows: true, columns: predicted")
    elif "confusions" in found and found["confusions"]["pairs"]:
        pairs, most_frequent = found["confusions"].values()
        rows = ((f"{one['count']:,}", one["true"], one["predicted"]) for one in most_frequent[:_MOST_LINES])
        say(f"the most frequent of {pairs:,} different confusions; --confusions FILE writes all:")
        print_rows(rows, header=("samples", "true", "predicted"), left=3)
