"""A trained model on one split: metrics, and how its routers used their experts.

Letters: n samples · C classes · G groups · K experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader

from mope_deploy.metrics import DENSE, accuracy, report
from mope_deploy.model import MoPE
from mope_deploy.progress import track
from train.data import Batches, Split

__all__ = ["Predictions", "Usage", "evaluate", "predict", "usage"]

USED_SHARE = 0.1  # of an even share: an expert that is the largest for fewer samples than that counts as unused


@dataclass(frozen=True)
class Predictions:
    """What a model said about a split: logits float32 (n, C) and routing float32 (n, layers, K), or None."""

    logits: NDArray[np.float32]
    routing: NDArray[np.float32] | None


@dataclass(frozen=True)
class Usage:
    """How experts were used.

    Attributes:
        names: of the rows below: class names, then values of the field that the rows were grouped by.
        classes: how many of them are classes.
        mean: mean routing weight (rows, layers, K); rows without samples are NaN.
        used: experts in use per layer, (layers,): those with the largest weight for at least n / (10 K) samples, a
            tenth of an even share.
    """

    names: tuple[str, ...]
    classes: int
    mean: NDArray[np.float64]
    used: NDArray[np.int64]

    def summary(self, *, samples: NDArray[np.int64]) -> dict[str, Any]:
        """JSON-ready: experts in all, in use per layer, and each class's mean weights; None where it has no sample.

        Args:
            samples: of each class (C,); of more than 100 classes only those with the most samples are listed.
        """
        listed = np.arange(self.classes)
        if self.classes > DENSE:
            listed = np.argsort(-samples, kind="stable")[:DENSE]
        rows = ((self.names[i], self.mean[i].round(4)) for i in listed.tolist())
        return {
            "experts": self.mean.shape[-1],
            "used_experts": self.used.tolist(),
            "mean_weight": {name: None if np.isnan(mean).any() else mean.tolist() for name, mean in rows},
        }


@torch.no_grad()
def predict(model: MoPE, batches: Batches, *, batch_size: int, device: torch.device) -> Predictions:
    """Run the whole model in evaluation mode and full precision over every row; results are in the order of rows."""
    model.eval()
    order = batches.longest_first()
    sampler = BatchSampler(order.tolist(), batch_size, drop_last=False)
    loader = DataLoader(batches, batch_sampler=sampler, collate_fn=Batches.ready)  # type: ignore[arg-type]
    logits, routing = [], []
    for batch in track(loader, what=f"evaluating {batches.split.name}"):
        out = model({name: value.to(device) for name, value in batch["inputs"].items()})
        logits.append(out.logits.float().cpu().numpy())
        if out.routing is not None:
            routing.append(out.routing.float().cpu().numpy())
    back = np.argsort(order)
    return Predictions(np.concatenate(logits)[back], np.concatenate(routing)[back] if routing else None)


def evaluate(split: Split, predictions: Predictions, *, group_by: str | None) -> dict[str, Any]:
    """The metrics of a split, JSON-ready: ``mope_deploy.metrics.report`` and, where rows are grouped, each group's."""
    true, decided = split.targets, split.task.decide(predictions.logits)
    found: dict[str, Any] = {"split": split.name, **report(true, decided, split.labels)}
    if group_by is not None:
        groups = {
            name: {"samples": int(rows.sum()), "accuracy": accuracy(true[rows], decided[rows])}
            for name, rows in split.groups.items()
        }
        found["by"] = {group_by: groups}
    return found


def usage(split: Split, routing: NDArray[np.float32], *, grouped: bool) -> Usage:
    """Mean routing weights by class, by group where rows are grouped, and how many experts each layer uses."""
    groups = split.groups if grouped else {}
    names = (*split.labels, *groups)
    members = [*split.task.members(split.targets), *groups.values()]  # (n,) each
    n, layers, K = routing.shape
    mean = np.full((len(names), layers, K), np.nan)
    for row, member in enumerate(members):
        if member.any():
            mean[row] = routing[member].mean(axis=0, dtype=np.float64)
    chosen = routing.argmax(axis=-1)  # (n, layers)
    counts = np.stack([np.bincount(chosen[:, layer], minlength=K) for layer in range(layers)])  # (layers, K)
    return Usage(names, len(split.labels), mean, (counts >= max(1.0, USED_SHARE * n / K)).sum(axis=1))
