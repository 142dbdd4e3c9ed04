"""What the same frozen features give without any conditioning: one modality alone, and late concatenation.

Every head is scikit-learn's and gets a fair chance: standardised features, whatever is to be chosen chosen on
validation, several seeds. Where labels depend on both inputs together a linear head on the concatenation is a straw
man; the MLP beside it is the comparison that counts.

Letters: n rows · F features · C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from mope_deploy.console import err
from mope_deploy.metrics import report
from mope_deploy.model import MoPE
from mope_deploy.model.backbones import Encoder
from mope_deploy.progress import track
from mope_deploy.task import Task
from train.data import Split, rows_of
from train.features import Features

__all__ = ["run_baselines", "unprompted_features"]

SCORES = ("validation", "accuracy", "f1_macro", "f1_micro")
SEEDS = 3
STRENGTHS = (1e-2, 1.0)  # C of the linear head: the inverse of its regularisation
HIDDEN, BATCH, WEIGHT_DECAY = 256, 256, 1e-2
RATES = (0.2, 0.05, 0.01)  # of the MLP: each until validation stops improving, from the best weights so far
ROUND_EPOCHS, ROUND_STEPS = 2, 50  # between two looks at validation, whichever is more
ROUNDS, PATIENCE = 25, 2  # in all; without a better validation metric


@dataclass(frozen=True)
class _Problem:
    """Standardised features float32 (n, F) and targets of the rows to train on, to choose by and to report."""

    features: list[NDArray[np.float32]]
    targets: list[NDArray[Any]]
    task: Task
    metric: str

    def scores(self, head: Any, split: int) -> dict[str, float]:
        predicted = head.predict(self.features[split]).astype(self.targets[split].dtype)
        return report(self.targets[split], predicted, self.task.labels)


def run_baselines(
    model: MoPE, splits: tuple[Split, Split, Split], features: Features, *, metric: str, seed: int
) -> list[dict[str, Any]]:
    """Train every head on the model's frozen encoders, without their prompts.

    Args:
        model: whose encoders are used; its prompts are not.
        splits: rows to train on, to choose by, and to report.
        features: how the encoders' features are made.
        metric: the validation metric to choose by.
        seed: the first of the seeds.

    Returns:
        One entry a head: ``name``, ``head`` (``linear`` or ``mlp``), ``parameters``, ``settings``, and ``validation``
        and the last split's ``accuracy``, ``f1_macro``, ``f1_micro``, each as ``mean`` and one value per seed (a linear
        head's solution is the same for all). None if the training rows have a single label.
    """
    task, targets = splits[0].task, [split.targets for split in splits]
    if not task.several and len(np.unique(targets[0])) < 2:
        err.print("note: no baselines, because all training rows have the same label", markup=False)
        return []
    of_splits = [unprompted_features(model, split, features) for split in splits]
    modalities = list(of_splits[0])
    sets = {f"{name} only": [name] for name in modalities} | {"late concatenation": modalities}
    heads: dict[str, Callable[[_Problem, int], dict[str, Any]]] = {"linear": _linear, "mlp": _mlp}
    found = []
    for name, parts, kind in track(
        [(*item, kind) for item in sets.items() for kind in heads], what="training baselines"
    ):
        rows = [np.concatenate([split[part] for part in parts], axis=1) for split in of_splits]
        scaler = StandardScaler().fit(rows[0])
        problem = _Problem([scaler.transform(split) for split in rows], targets, task, metric)
        found.append({"name": name, "head": kind, **heads[kind](problem, seed)})
    return found


def unprompted_features(model: MoPE, split: Split, features: Features) -> dict[str, NDArray[np.float32]]:
    """Pooled features of every row from the bare encoders, {modality: (n, F)}, the main modality first."""
    backbones: dict[str, Encoder] = {model.config.main.modality: model.main}
    backbones |= {name: encoder.backbone for name, encoder in model.complementary_encoders().items()}
    return {
        name: rows_of(features.bare(backbone, name, split), split.columns[name]).numpy()
        for name, backbone in backbones.items()
    }


def _linear(problem: _Problem, seed: int) -> dict[str, Any]:
    heads = {C: LogisticRegression(C=C, max_iter=100) for C in STRENGTHS}
    if problem.task.several:
        heads = {C: OneVsRestClassifier(head) for C, head in heads.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: nothing to gain; a label that no row has: never given
        for head in heads.values():
            head.fit(problem.features[0], problem.targets[0])
    validation = {C: problem.scores(head, 1)[problem.metric] for C, head in heads.items()}
    C = max(heads, key=lambda C: validation[C])
    parts = heads[C].estimators_ if problem.task.several else [heads[C]]
    arrays = [array for part in parts if hasattr(part, "coef_") for array in (part.coef_, part.intercept_)]
    return _entry(problem, [(heads[C], validation[C])], arrays, {"C": C})


def _mlp(problem: _Problem, seed: int) -> dict[str, Any]:
    fitted = [_fitted_mlp(problem, seed + i) for i in range(SEEDS)]
    arrays = (*fitted[0][0].coefs_, *fitted[0][0].intercepts_)
    return _entry(problem, fitted, arrays, {"learning_rate": list(RATES), "alpha": WEIGHT_DECAY})


def _entry(problem: _Problem, fitted: list[Any], arrays: Iterable[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What is reported of the heads (head, validation metric) of each seed and the parameters of one of them."""
    found = [{**problem.scores(head, 2), "validation": validation} for head, validation in fitted]
    return {"parameters": sum(array.size for array in arrays), "settings": settings} | {
        key: {"mean": mean(scores[key] for scores in found), "seeds": [scores[key] for scores in found]}
        for key in SCORES
    }


def _fitted_mlp(problem: _Problem, seed: int) -> tuple[MLPClassifier, float]:
    """The network that was best on validation, and its validation metric; scikit-learn's own early stopping would
    hold out rows at random, whose pictures it has seen.
    """
    x, targets = problem.features[0], problem.targets[0]
    head = MLPClassifier(
        (HIDDEN,),
        solver="sgd",
        alpha=WEIGHT_DECAY,
        batch_size=min(BATCH, len(x)),
        max_iter=max(ROUND_EPOCHS, math.ceil(ROUND_STEPS / math.ceil(len(x) / BATCH))),
        warm_start=True,
        random_state=np.random.RandomState(seed),  # goes on from round to round, where a number would begin again
    )
    best, score, rounds = deepcopy(head), -1.0, 0
    for rate in RATES:
        head, since = deepcopy(best).set_params(learning_rate_init=rate), 0
        while since < PATIENCE and rounds < ROUNDS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    head.fit(x, targets)
            except ValueError:  # the rate is too high: weights are not finite any more
                break
            rounds += 1
            now = problem.scores(head, 1)[problem.metric]
            best, score, since = (deepcopy(head), now, 0) if now > score else (best, score, since + 1)
    return best, score
