"""The golden samples, run through a session: does this engine on this device compute what was exported?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mope_deploy.bundle import Bundle
from mope_deploy.engines.session import Session
from mope_deploy.errors import ParityError

__all__ = ["Verification", "check_outputs_are_golden"]


@dataclass(frozen=True)
class Verification:
    """What the golden samples measured.

    Args:
        graph: name of the graph.
        samples: number of golden samples.
        logits_error: ``max|a - b| / max|b|`` against the golden logits.
        routing_error: ``max|a - b|`` against the golden routing; None if the graph has none.
        near_ties: golden samples whose labels flipped within the tolerance: two best logits, or a logit and the
            threshold of a multi-label task, are nearer than it.
    """

    graph: str
    samples: int
    logits_error: float
    routing_error: float | None
    near_ties: int


def check_outputs_are_golden(bundle: Bundle, session: Session, *, graph: str) -> Verification:
    """Run the golden input arrays and compare with the golden outputs, within the tolerances of the session's graph.

    Raises:
        ParityError: an output beyond its tolerance, of another shape or not finite; the message has the figures.
        BundleError: the golden files are damaged.
    """
    inputs, outputs = bundle.golden()
    where = f"{bundle.path}, graph {graph}"
    tolerance = next(one.tolerance for one in bundle.manifest.graphs if one.name == graph)
    found = session.run({spec.name: inputs[spec.name] for spec in session.inputs})
    for name, array in found.items():
        if array.shape != outputs[name].shape or not np.isfinite(array).all():
            raise ParityError(
                f"{where}: {name}",
                received=f"shape {array.shape}{'' if np.isfinite(array).all() else ' with NaN or infinity'}",
                expected=f"finite values of shape {outputs[name].shape}",
            )
    errors = {name: np.abs(array.astype(np.float64) - outputs[name]).max() for name, array in found.items()}
    errors["logits"] /= max(np.abs(outputs["logits"]).max(), np.finfo(np.float32).tiny)
    for name, limit in (("logits", tolerance.logits), ("routing", tolerance.routing)):
        allowed = max(limit, session.least_tolerance)
        if name in errors and not errors[name] <= allowed:
            raise ParityError(
                f"{where}: {name} are not the golden ones",
                received=f"an error of {errors[name]:.2g}",
                expected=f"at most {allowed:.2g}",
                todo=f"this {session.name} on {session.device} computes something else; do not use it",
            )
    task = bundle.manifest.task
    decided = [task.cells(task.decide(logits)) for logits in (found["logits"], outputs["logits"])]  # (B, 1) or (B, C)
    flips = (decided[0] != decided[1]).any(axis=-1)
    return Verification(
        graph=graph,
        samples=len(flips),
        logits_error=float(errors["logits"]),
        routing_error=float(errors["routing"]) if "routing" in errors else None,
        near_ties=int(flips.sum()),
    )
