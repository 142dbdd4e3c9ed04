"""What a file of lower precision has to reach."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mope_deploy.errors import UsageError

__all__ = ["THRESHOLDS", "Thresholds"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What has to be reached, as shares 0 to 1.

    Attributes:
        labels: least share of equal predictions; of multi-label models, of equal answers yes or no to every label.
        routing: least share of samples with the same top expert, in every layer by itself; None asks for nothing.
        metric: largest drop of the task's metric, 0.01 for one point; None asks for nothing.
        probability: largest change of any one probability, |Δp|; None asks for nothing.
        mean_probability: the mean over samples of the largest |Δp| among each one's labels; None asks for nothing.
        logits: largest RMS change of the logits, as a share of the spread of the model's own; None asks for nothing.

    Raises:
        UsageError: a value that is no share.
    """

    labels: float
    routing: float | None
    metric: float | None
    probability: float | None = None
    mean_probability: float | None = None
    logits: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"the threshold for {field.name}", received=value, expected="a share from 0 to 1")

    def to_dict(self) -> dict[str, float]:
        """For the manifest: those that ask for something."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


# An accuracy cannot drop by more than the labels that differ: for fp16 its threshold says nothing new. The F1 of a
# multi-label task can, since most answers are "no" and one in a thousand of all may be one in a hundred of the "yes":
# half a point bounds that. The router itself stays in fp32, but reads states that were rounded.
# bf16 has three bits of mantissa less than fp16, which makes its errors as large as those of int8.
#
# Labels say nothing of what they were told by: a head at a quarter of its size keeps them all. Trained models measure
# (docs/precision.md) max |Δp| 0.004, mean 0.0003, RMS 0.001 in fp16, and at most 0.071, 0.0076 and 0.025 in int8. The
# bounds leave about ten times that to fp16, and four times to int8, whose errors are large already.
_ROUNDED = Thresholds(labels=0.999, routing=0.995, metric=0.005, probability=0.05, mean_probability=0.003, logits=0.01)
_QUANTISED = Thresholds(labels=0.99, routing=0.99, metric=0.01, probability=0.25, mean_probability=0.03, logits=0.1)
_EXACT = Thresholds(labels=0.999, routing=0.999, metric=0.001, probability=0.01, mean_probability=0.001, logits=0.001)
THRESHOLDS = {
    "fp32": _EXACT,
    "fp16": _ROUNDED,
    "bf16": _QUANTISED,
    "int8": _QUANTISED,
    "int8-dynamic": _QUANTISED,
}
