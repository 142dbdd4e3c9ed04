"""What the same frozen features give without any conditioning: one modality alone, and late concatenation.

Every head gets a fair chance: standardised features, AdamW with cosine decay, early stopping on validation, the
learning rate that is best on validation, and several seeds. Where labels depend on both inputs together a linear head
on the concatenation is a straw man; the MLP beside it is the comparison that counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mope_deploy.metrics import report
from mope_deploy.model import MoPE
from mope_deploy.progress import track
from train.data import Split, rows_of
from train.evaluation import decide
from train.features import Features

__all__ = ["run_baselines", "unprompted_features"]

HIDDEN = 256
BATCH = 256
ROUND_STEPS = 50  # a round between two validations is an epoch, or so many steps where there are few rows
ROUNDS = 24
PATIENCE = 6  # rounds without a better validation metric
LEARNING_RATES = {"linear": (1e-2,), "mlp": (3e-3, 1e-2)}  # at the start of a cosine decay
WEIGHT_DECAY = 1e-2
DROPOUT = 0.1
SEEDS = 3


@dataclass(frozen=True)
class _Task:
    """Features (n, F) and targets of the three splits, and how they are scored."""

    features: tuple[Tensor, Tensor, Tensor]
    targets: tuple[Tensor, Tensor, Tensor]
    labels: tuple[str, ...]
    multi_label: bool
    metric: str


def run_baselines(
    model: MoPE,
    splits: tuple[Split, Split, Split],
    features: Features,
    *,
    metric: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Train every head on the model's frozen encoders, without their prompts.

    Args:
        model: whose encoders are used; its prompts are not.
        splits: rows to train on, to choose by, and to report.
        features: how the encoders' features are made or found; heads are trained on its device.
        metric: the validation metric to choose by.
        seed: the first of the seeds.

    Returns:
        One entry a head: ``name``, ``head`` (``linear`` or ``mlp``), ``parameters``, ``learning_rate``, ``validation``
        and the last split's ``accuracy``, ``f1_macro``, ``f1_micro``, each as ``mean`` and one value per seed.
    """
    of_splits = [unprompted_features(model, split, features) for split in splits]
    device = features.device
    modalities = list(of_splits[0])
    sets = {f"{name} only": [name] for name in modalities} | {"late concatenation": modalities}
    targets = tuple(_targets(split).to(device) for split in splits)
    heads = [(name, parts, kind) for name, parts in sets.items() for kind in LEARNING_RATES]
    found = []
    for name, parts, kind in track(heads, what="training baselines"):
        task = _Task(
            features=_standardised([torch.cat([rows[part] for part in parts], dim=1).to(device) for rows in of_splits]),
            targets=targets,  # type: ignore[arg-type]
            labels=splits[0].labels,
            multi_label=splits[0].multi_label,
            metric=metric,
        )
        found.append({"name": name, **_tuned(task, kind, seed=seed)})
    return found


def unprompted_features(model: MoPE, split: Split, features: Features) -> dict[str, Tensor]:
    """Pooled features of every row from the bare encoders, {modality: float32 (n, D)}, the main modality first."""
    backbones = {model.config.main.modality: model.main}
    backbones |= {name: encoder.backbone for name, encoder in model.complementary_encoders().items()}
    return {
        name: rows_of(features.bare(backbone, name, split), split.column(name)) for name, backbone in backbones.items()
    }


def _tuned(task: _Task, kind: str, *, seed: int) -> dict[str, Any]:
    """The learning rate is chosen on the first seed; the other seeds use it."""
    rates = LEARNING_RATES[kind]
    tried = {rate: _trained(task, kind, rate, seed) for rate in rates}
    best = max(rates, key=lambda rate: tried[rate]["validation"])
    results = [tried[best]] + [_trained(task, kind, best, seed + i) for i in range(1, SEEDS)]
    scores = {
        key: {"mean": mean(result[key] for result in results), "seeds": [result[key] for result in results]}
        for key in ("validation", "accuracy", "f1_macro", "f1_micro")
    }
    return {"head": kind, "parameters": results[0]["parameters"], "learning_rate": best, **scores}


def _trained(task: _Task, kind: str, rate: float, seed: int) -> dict[str, Any]:
    device = task.features[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights, order of rows, dropout
        head = _head(kind, task.features[0].shape[1], len(task.labels)).to(device)
        best = _fit(head, task, rate)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    return {"parameters": parameters, "validation": best, **_scores(head, task, 2)}


def _fit(head: nn.Module, task: _Task, rate: float) -> float:
    """Train until validation stops improving; the best validation metric, whose weights ``head`` has in the end."""
    x, target = task.features[0], task.targets[0]
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    epoch = math.ceil(len(x) / BATCH)  # steps
    passes = math.ceil(ROUND_STEPS / epoch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=ROUNDS * passes * epoch)
    best, state, since = -1.0, head.state_dict(), 0
    for _ in range(ROUNDS):
        head.train()
        for _ in range(passes):
            for rows in torch.randperm(len(x)).to(x.device).split(BATCH):
                logits = head(x.index_select(0, rows))  # a quarter of the time of x[rows]
                chosen = target.index_select(0, rows)
                if task.multi_label:
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, chosen.float())
                else:
                    loss = nn.functional.cross_entropy(logits, chosen)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        score = _scores(head, task, 1)[task.metric]
        if score > best:
            best, since = score, 0
            state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        else:
            since += 1
            if since >= PATIENCE:
                break
    head.load_state_dict(state)
    return best


@torch.no_grad()
def _scores(head: nn.Module, task: _Task, split: int) -> dict[str, float]:
    head.eval()
    decided = decide(head(task.features[split]).cpu().numpy(), multi_label=task.multi_label)
    found = report(task.targets[split].cpu().numpy(), decided, task.labels)
    return {key: found[key] for key in ("accuracy", "f1_macro", "f1_micro")}


def _head(kind: str, width: int, classes: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, classes))


def _standardised(features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the training mean, over the training deviation."""
    mean, deviation = features[0].mean(dim=0), features[0].std(dim=0, unbiased=False).clamp_min(1e-4)
    train, validation, test = ((rows - mean) / deviation for rows in features)
    return train, validation, test


def _targets(split: Split) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(split.targets()))
