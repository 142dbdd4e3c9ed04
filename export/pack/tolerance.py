"""How far golden outputs may be off on a device: from what was measured, and never so far that it proves nothing."""

from __future__ import annotations

import numpy as np

from export.pack.golden import Golden
from mope_deploy.engines.golden import MOST_TOLERANCE, errors_of
from mope_deploy.engines.replay import greatest_sizes, replays
from mope_deploy.engines.session import Session
from mope_deploy.errors import ParityError
from mope_deploy.manifest import Tolerance
from mope_deploy.preprocess import Preprocessing

__all__ = ["golden_errors", "golden_tolerance"]

# What golden samples may differ by on another machine: at least this much of fp32, and so many times what was measured
# here. Where precision is lower, other engines round in other places, so the room is wider and its multiple smaller.
LEAST = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "int8-dynamic": 5e-2}
FACTOR = {"fp32": 10.0, "fp16": 3.0, "bf16": 3.0, "int8": 3.0, "int8-dynamic": 3.0}
ROOM = 1.5  # times what was measured: with less, a good device would be refused


def golden_errors(session: Session, golden: Golden, preprocessing: Preprocessing) -> dict[str, float]:
    """The largest error of each output over every batch that a device will run; see :func:`errors_of`.

    Raises:
        ParityError: an output of another shape, or not finite.
    """
    samples = len(golden.outputs["logits"])
    greatest = greatest_sizes(preprocessing.text, preprocessing.audio, samples, engine={}, bundle={})
    pad_id = preprocessing.text.pad_id if preprocessing.text is not None else 0
    worst: dict[str, float] = {}
    for replay in replays(golden.inputs, session.inputs, greatest=greatest, pad_id=pad_id):
        errors = errors_of(session.run(replay.feeds), golden.outputs, replay, f"golden samples, {replay.name}")
        worst = {name: max(worst.get(name, 0.0), error) for name, error in errors.items()}
    return worst


def golden_tolerance(name: str, precision: str, errors: dict[str, float], golden: Golden) -> Tolerance:
    """What a device may be off by.

    Args:
        name: of the graph.
        precision: of it.
        errors: what it is off by here.
        golden: the samples.

    Raises:
        ParityError: it would have to be more than golden samples can tell from a wrong graph.
    """
    logits = golden.outputs["logits"].astype(np.float64)
    # What the best answer that is always the same would be off by; half of it is as far as a tolerance goes of itself.
    constant = float(np.ptp(logits, axis=0).max() / 2 / np.abs(logits).max())
    allowed = {}
    for output, error in errors.items():
        most = getattr(MOST_TOLERANCE, output)
        if not ROOM * error <= most:
            raise ParityError(
                f"{name} is so far from the model that no device could be checked with golden samples",
                received=f"{output} off by {error:.2g}",
                expected=f"at most {most / ROOM:.2g}",
                todo="leave this precision out, or ask for more with --threshold",
            )
        wished = max(LEAST[precision], FACTOR[precision] * error)
        if output == "logits":
            wished = max(min(wished, constant / 2), LEAST["fp32"], ROOM * error)
        allowed[output] = min(wished, most)
    return Tolerance(logits=allowed["logits"], routing=allowed.get("routing", LEAST[precision]))
