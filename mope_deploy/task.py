"""What a model's logits and a row's label mean: one class a kind of task, and nothing else asks which kind it is.

Letters: n samples · C labels. Rows are read (:mod:`mope_deploy.data`), training targets made, predictions decided,
gates judged and manifests written through :class:`Task` alone; ``train/losses.py`` has each task's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import DataError
from mope_deploy.fields import shown, twice

__all__ = ["TASKS", "Label", "MultiLabel", "SingleLabel", "Task"]

Label = str | tuple[str, ...]


class Task(Protocol):
    """A kind of task over named labels.

    Attributes:
        type: what recipes, checkpoints and manifests call this kind.
        metric: name of the figure that decides between models, one of :func:`mope_deploy.metrics.report`'s.
        fewest_labels: how many labels a model of this kind needs.
        several: whether a sample carries any number of labels instead of exactly one.
        labels: the C names, in the order of the logits; empty where any name is taken (rows that are scanned).
        threshold: least probability of a label that is given; None where labels compete.
    """

    type: ClassVar[str]
    metric: ClassVar[str]
    fewest_labels: ClassVar[int]
    several: ClassVar[bool]

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def threshold(self) -> float | None: ...

    def read(self, value: object, where: str, name: Callable[[object, str], str]) -> Label:
        """A row's label, from parsed JSON.

        Args:
            value: what stands under ``label``; not None.
            where: ``file:line``, for messages.
            name: checks one name.

        Raises:
            DataError: a label of another kind of task, or a name that ``name`` refuses.
        """

    def encode(self, labels: Sequence[Label | None]) -> NDArray[Any]:
        """What the loss and the metrics compare with: class indices int64 (n,), or booleans (n, C).

        A sample without a label is -1, or no label at all.
        """

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Of every label, (n, C): they sum to 1 where labels compete."""

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        """What logits (n, C) say, in the form of :meth:`encode`."""

    def cells(self, values: NDArray[Any]) -> NDArray[Any]:
        """Targets or decisions as one table of what can be right or wrong: (n, 1), or (n, C)."""

    def verdicts(self, logits: NDArray[Any]) -> list[tuple[str, str, float]]:
        """Every decision about one sample's logits (C,): what is decided, the decision, and how far it is from another.

        The distance is in logits: between the two best, or from the threshold.
        """

    def name(self, logits: NDArray[Any]) -> tuple[Label, float | None]:
        """The label that one sample's logits (C,) give, and its probability where it is a single one."""

    def members(self, targets: NDArray[Any]) -> NDArray[np.bool_]:
        """Which samples carry each label, (C, n), from :meth:`encode`'s targets."""

    def counts(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """How many samples carry each label, (C,), from :meth:`encode`'s targets."""

    def flips(self, logits: NDArray[Any], others: NDArray[Any]) -> list[tuple[str, str, str, float]]:
        """Where one sample's logits (C,) and another model's decide differently.

        What is decided, both decisions, and by how much ``logits`` prefer their own to the other one.
        """


@dataclass(frozen=True)
class SingleLabel:
    """Exactly one label a sample: a softmax over the labels."""

    type: ClassVar[str] = "single-label"
    metric: ClassVar[str] = "accuracy"
    fewest_labels: ClassVar[int] = 2
    several: ClassVar[bool] = False

    labels: tuple[str, ...] = ()
    threshold: None = None

    def read(self, value: object, where: str, name: Callable[[object, str], str]) -> Label:
        if isinstance(value, list):
            todo = "lists of names belong to multi-label tasks; in a recipe: model.task=multi-label"
            raise DataError(f"{where}: label", received=shown(value), expected="one label name", todo=todo)
        return name(value, where)

    def encode(self, labels: Sequence[Label | None]) -> NDArray[Any]:
        index: dict[Label | None, int] = {name: i for i, name in enumerate(self.labels)} | {None: -1}
        return np.array([index[label] for label in labels], np.int64)

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        wide = logits.astype(np.float64)
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        return logits.argmax(axis=-1)

    def cells(self, values: NDArray[Any]) -> NDArray[Any]:
        return values[:, None]

    def verdicts(self, logits: NDArray[Any]) -> list[tuple[str, str, float]]:
        best = np.sort(logits)[-2:]
        return [("label", self.labels[int(logits.argmax())], float(best[-1] - best[0]))]

    def name(self, logits: NDArray[Any]) -> tuple[Label, float | None]:
        best = int(logits.argmax())
        return self.labels[best], float(self.probabilities(logits)[best])

    def members(self, targets: NDArray[Any]) -> NDArray[np.bool_]:
        return targets[None, :] == np.arange(len(self.labels))[:, None]

    def counts(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(targets[targets >= 0], minlength=len(self.labels))

    def flips(self, logits: NDArray[Any], others: NDArray[Any]) -> list[tuple[str, str, str, float]]:
        ours, theirs = int(logits.argmax()), int(others.argmax())
        margin = float(logits[ours]) - float(logits[theirs])
        return [] if ours == theirs else [("label", self.labels[ours], self.labels[theirs], margin)]


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels a sample, none included: a sigmoid and a threshold for each."""

    type: ClassVar[str] = "multi-label"
    metric: ClassVar[str] = "f1_micro"
    fewest_labels: ClassVar[int] = 1
    several: ClassVar[bool] = True

    labels: tuple[str, ...] = ()
    threshold: float = 0.5

    def read(self, value: object, where: str, name: Callable[[object, str], str]) -> Label:
        if not isinstance(value, list):
            hint = f'write ["{value}"]' if isinstance(value, str) else None
            raise DataError(f"{where}: label", received=shown(value), expected="an array of label names", todo=hint)
        names = tuple(name(item, where) for item in value)
        if twice(names) is not None:
            raise DataError(f"{where}: label", received="a name twice", expected="every name once")
        return names

    def encode(self, labels: Sequence[Label | None]) -> NDArray[Any]:
        index = {name: i for i, name in enumerate(self.labels)}
        found = np.zeros((len(labels), len(index)), bool)
        for row, names in enumerate(labels):
            found[row, [index[name] for name in names or ()]] = True
        return found

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))  # no overflow at either end

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        return self.probabilities(logits) >= self.threshold

    def cells(self, values: NDArray[Any]) -> NDArray[Any]:
        return values

    def verdicts(self, logits: NDArray[Any]) -> list[tuple[str, str, float]]:
        with np.errstate(divide="ignore"):  # a threshold of 0 or 1 is infinitely far
            given, bound = self.decide(logits), float(np.log(self.threshold) - np.log1p(-self.threshold))
        rows = zip(self.labels, given.tolist(), np.abs(logits - bound).tolist(), strict=True)
        return [(f"label {name}", "yes" if yes else "no", gap) for name, yes, gap in rows]

    def name(self, logits: NDArray[Any]) -> tuple[Label, float | None]:
        return tuple(np.array(self.labels, object)[self.decide(logits)].tolist()), None

    def members(self, targets: NDArray[Any]) -> NDArray[np.bool_]:
        return targets.T

    def counts(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        return targets.sum(axis=0)

    def flips(self, logits: NDArray[Any], others: NDArray[Any]) -> list[tuple[str, str, str, float]]:
        pairs = zip(self.verdicts(logits), self.verdicts(others), strict=True)
        return [(what, ours, theirs, margin) for (what, ours, margin), (_, theirs, _) in pairs if ours != theirs]


TASKS: dict[str, type[SingleLabel] | type[MultiLabel]] = {kind.type: kind for kind in (SingleLabel, MultiLabel)}
