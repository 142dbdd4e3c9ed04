"""Accuracy, F1 and confusion in numpy; the same numbers in training, in the gate and on the device.

Letters: n samples · C classes · K experts. Single-label: class indices int (n,). Multi-label: booleans (n, C).
Definitions are scikit-learn's defaults with ``zero_division=0`` (its user guide, "Metrics and scoring").
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mope_deploy.errors import UsageError

__all__ = ["DENSE", "accuracy", "confusion_matrix", "confusions_csv", "f1_scores", "report"]

DENSE = 100  # classes up to which a confusion matrix is listed cell by cell; of more, so many most frequent confusions


def accuracy(true: ArrayLike, predicted: ArrayLike) -> float:
    """Share of samples that are right, 0 to 1; multi-label: all of a sample's labels right (subset accuracy)."""
    true, predicted = _pair(true, predicted)
    right = true == predicted
    return float(right.mean() if right.ndim == 1 else right.all(axis=1).mean())


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Counts (C, C) of a single-label task: row = true class, column = predicted class."""
    true, predicted = _indices(true, predicted, classes)
    cells = np.bincount(true.astype(np.int64) * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


def confusions_csv(true: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> str:
    """Every cell of a single-label task's confusion matrix that is not 0, as CSV with a header, most frequent first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("true", "predicted", "count"))
    writer.writerows((labels[t], labels[p], count) for t, p, count in _cells(true, predicted, len(labels)))
    return text.getvalue()


def f1_scores(true: ArrayLike, predicted: ArrayLike, classes: int) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN), 0 where that is 0/0.

    Returns:
        ``macro``: mean over classes; single-label tasks leave out classes that neither occur nor are predicted,
        multi-label tasks count every class. ``micro``: of the summed counts. ``per_class``: C floats. All 0 to 1.
    """
    true, predicted = _pair(true, predicted)
    if true.ndim == 1:
        true, predicted = _indices(true, predicted, classes)
        hits = np.bincount(true[true == predicted], minlength=classes)  # (C,), as the total
        total = np.bincount(true, minlength=classes) + np.bincount(predicted, minlength=classes)
        counted = total > 0
    else:
        if true.shape[1] != classes:
            raise UsageError("multi-label arrays", received=f"{true.shape[1]} classes", expected=classes)
        hits, total = (true & predicted).sum(0), true.sum(0) + predicted.sum(0)
        counted = np.ones(classes, bool)
    per_class = 2 * hits / np.maximum(total, 1)  # hits are 0 where the total is
    micro = 2 * hits.sum() / max(total.sum(), 1)
    return {"macro": float(per_class[counted].mean()), "micro": float(micro), "per_class": per_class.tolist()}


def report(true: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> dict[str, Any]:
    """Everything above for one task, JSON-ready.

    Args:
        true, predicted: class indices (n,) or, for multi-label tasks, booleans (n, C).
        labels: the C names.

    Returns:
        ``samples``, ``accuracy``, ``f1_macro``, ``f1_micro``, ``per_class`` {label: {``f1``, ``support``}} and, for
        single-label tasks, ``confusion_matrix`` (rows = true) as lists; of more than 100 classes, whose matrix would be
        nearly all zeros, ``confusions`` instead: ``pairs``, how many different confusions there are, and
        ``most_frequent``, at most 100 of them as {``true``, ``predicted``, ``count``}.
    """
    true, predicted = _pair(true, predicted)
    scores = f1_scores(true, predicted, len(labels))
    support = np.bincount(true, minlength=len(labels)) if true.ndim == 1 else true.sum(0)
    each = zip(labels, scores["per_class"], support.tolist(), strict=True)
    found: dict[str, Any] = {
        "samples": int(true.shape[0]),
        "accuracy": accuracy(true, predicted),
        "f1_macro": scores["macro"],
        "f1_micro": scores["micro"],
        "per_class": {label: {"f1": f1, "support": count} for label, f1, count in each},
    }
    if true.ndim == 1 and len(labels) <= DENSE:
        found["confusion_matrix"] = confusion_matrix(true, predicted, len(labels)).tolist()
    elif true.ndim == 1:
        wrong = [cell for cell in _cells(true, predicted, len(labels)) if cell[0] != cell[1]]
        most = [{"true": labels[t], "predicted": labels[p], "count": count} for t, p, count in wrong[:DENSE]]
        found["confusions"] = {"pairs": len(wrong), "most_frequent": most}
    return found


def _cells(true: ArrayLike, predicted: ArrayLike, classes: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, count) where that is not 0, by falling count, of equal ones by class."""
    true, predicted = _indices(true, predicted, classes)
    cells, counts = np.unique(true.astype(np.int64) * classes + predicted, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        (cell // classes, cell % classes, n)
        for cell, n in zip(cells[order].tolist(), counts[order].tolist(), strict=True)
    ]


def _indices(true: ArrayLike, predicted: ArrayLike, classes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    true, predicted = _pair(true, predicted, ndim=1)
    for indices in (true, predicted):
        if indices.min() < 0 or indices.max() >= classes:
            received = f"{indices.min()} to {indices.max()}"
            raise UsageError("class indices", received=received, expected=f"0 to {classes - 1}")
    return true, predicted


def _pair(true: ArrayLike, predicted: ArrayLike, *, ndim: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    true, predicted = np.asarray(true), np.asarray(predicted)
    kinds = {1: "iu", 2: "b"}  # class indices, multi-label booleans
    fits = all(array.dtype.kind in kinds.get(array.ndim, "") for array in (true, predicted))
    if true.shape != predicted.shape or not fits or true.shape[0] == 0 or (ndim is not None and true.ndim != ndim):
        raise UsageError(
            "arrays to compare",
            received=f"{true.dtype} {true.shape} and {predicted.dtype} {predicted.shape}",
            expected="class indices (n,) twice" + ("" if ndim == 1 else ", or booleans (n, classes) twice"),
        )
    return true, predicted
