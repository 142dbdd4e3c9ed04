"""The golden samples: does this device prepare, and this engine on it compute, what was exported?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.bundle import Bundle
from mope_deploy.engines.replay import Replay, greatest_sizes, replays
from mope_deploy.engines.session import Arrays, Session
from mope_deploy.errors import BundleError, DataError, MissingExtraError, ParityError, UsageError
from mope_deploy.extras import installed_versions
from mope_deploy.manifest import Tolerance
from mope_deploy.preprocess import Preprocessing
from mope_deploy.task import Task

__all__ = [
    "MOST_TOLERANCE",
    "Verification",
    "check_inputs_are_golden",
    "check_outputs_are_golden",
    "errors_of",
    "first_wrong_label",
]

# What no manifest and no engine may go beyond. Of logits a tenth of the largest: a head that is zero is off by all of
# it, one that is halved by half. Of routing a quarter of the weight: then no expert that has three quarters can lose
# to another one.
MOST_TOLERANCE = Tolerance(logits=0.1, routing=0.25)


@dataclass(frozen=True)
class Verification:
    """What the golden samples measured.

    Args:
        graph: name of the graph.
        samples: number of golden samples.
        logits_error: ``max|a - b| / max|b|`` against the golden logits, the largest of all batches.
        routing_error: ``max|a - b|`` against the golden routing; None if the graph has none.
        near_ties: golden samples whose labels flipped within the tolerance: two best logits, or a logit and the
            threshold of a multi-label task, are nearer than twice the tolerance.
        batches: that were run: all samples as stored, each alone, and the greatest sizes.
    """

    graph: str
    samples: int
    logits_error: float
    routing_error: float | None
    near_ties: int
    batches: int = 1


def check_inputs_are_golden(bundle: Bundle, preprocessing: Preprocessing) -> None:
    """The golden samples, prepared on this device, are the golden arrays to the last bit.

    Raises:
        ParityError: they are not; the message has the figures.
        BundleError: the golden files are damaged.
        MissingExtraError: a package that reads sound or video is not installed.
    """
    golden, _ = bundle.golden()
    try:
        samples = bundle.golden_samples()
        made = preprocessing.collate([loaded for _, loaded in samples.load(preprocessing)])
    except MissingExtraError:
        raise
    except (DataError, UsageError) as error:
        raise BundleError(f"golden samples: {error}") from error
    for name, array in golden.items():
        mine = made[name]
        if array.shape == mine.shape and array.tobytes() == mine.tobytes():
            continue
        versions = installed_versions(("numpy",) if name.startswith("audio") else ("pillow", "tokenizers"))
        here = " or ".join(f"{package} (here {version})" for package, version in versions.items())
        differ = f"{(array != mine).sum():,} of {array.size:,} values" if array.shape == mine.shape else None
        raise ParityError(
            f"{samples.path}: preprocessing on this device does not give the golden {name}",
            received=differ or f"shape {mine.shape}, not {array.shape}",
            expected="equality to the last bit",
            todo=f"try another version of {here}",
        )


def check_outputs_are_golden(bundle: Bundle, session: Session, *, graph: str, sizes: bool = True) -> Verification:
    """Run the golden input arrays and compare with the golden outputs, within the tolerances of the session's graph.

    Args:
        bundle, session, graph: the bundle, one of its graphs in an engine, and that graph's name.
        sizes: run each sample alone and a batch of the greatest sizes too, which takes time and memory.

    Raises:
        ParityError: an output beyond its tolerance, of another shape or not finite, or another label where the golden
            one is no near-tie; the message has the figures.
        BundleError: the golden files are damaged, or their logits are all zero.
        EngineError: the engine fails at one of the sizes.
    """
    inputs, outputs = bundle.golden()
    manifest = bundle.manifest
    if not outputs["logits"].any():
        raise BundleError(
            f"{bundle.path / manifest.golden.outputs}", received="logits that are all 0", expected="ones that tell"
        )
    asked = next(one.tolerance for one in manifest.graphs if one.name == graph)
    allowed = {name: max(min(getattr(asked, name), most), session.least_tolerance) for name, most in _MOST.items()}
    samples = len(outputs["logits"])
    built_for = {axis: sizes.max for axis, sizes in getattr(session, "profile", {}).items()}
    exported_for = {axis: sizes[2] for axis, sizes in manifest.build.profile.items()}
    most = greatest_sizes(manifest.text, manifest.audio, samples, engine=built_for, bundle=exported_for)
    pad_id = manifest.text.pad_id if manifest.text is not None else 0
    session = getattr(session, "uncached", session)  # else a part of a split graph would run once for all batches
    where = f"{bundle.path}, graph {graph}"
    worst, flipped, batches = dict.fromkeys(_MOST, 0.0), np.zeros(samples, bool), 0
    for replay in replays(inputs, session.inputs, greatest=most, pad_id=pad_id):
        found = session.run(replay.feeds)
        errors = errors_of(found, outputs, replay, where)
        _check_errors(errors, allowed, where, replay, session)
        other = _flipped(manifest.task, found, outputs, replay, allowed["logits"], where)
        np.logical_or.at(flipped, replay.rows, other)
        worst = {name: max(worst[name], error) for name, error in errors.items()}
        batches += 1
        if not sizes:
            break
    return Verification(
        graph=graph,
        samples=samples,
        logits_error=worst["logits"],
        routing_error=worst.get("routing"),
        near_ties=int(flipped.sum()),
        batches=batches,
    )


_MOST = {"logits": MOST_TOLERANCE.logits, "routing": MOST_TOLERANCE.routing}


def errors_of(
    found: Mapping[str, NDArray[Any]], golden: Mapping[str, NDArray[Any]], replay: Replay, where: str
) -> dict[str, float]:
    """``logits``: max|a − b| / max|b| over all golden logits; ``routing``: max|a − b|, where the graph has it.

    Raises:
        ParityError: an output of another shape, or not finite.
    """
    errors: dict[str, float] = {}
    for name, array in found.items():
        wanted = golden[name][replay.rows]
        if array.shape != wanted.shape or not np.isfinite(array).all():
            raise ParityError(
                f"{where}: {name}, {replay.name}",
                received=f"shape {array.shape}{'' if np.isfinite(array).all() else ' with NaN or infinity'}",
                expected=f"finite values of shape {wanted.shape}",
            )
        errors[name] = float(np.abs(array.astype(np.float64) - wanted).max())
    errors["logits"] /= float(np.abs(golden["logits"]).max())
    return errors


def _check_errors(
    errors: Mapping[str, float], allowed: Mapping[str, float], where: str, replay: Replay, session: Session
) -> None:
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise ParityError(
                f"{where}: {name} are not the golden ones",
                received=f"an error of {error:.2g}",
                expected=f"at most {allowed[name]:.2g}, {replay.name}",
                todo=f"this {session.name} on {session.device} computes something else; do not use it",
            )


def _flipped(
    task: Task, found: Arrays, golden: Mapping[str, NDArray[Any]], replay: Replay, tolerance: float, where: str
) -> NDArray[np.bool_]:
    """Rows (B,) whose label is another one; a :class:`ParityError` where the golden one is no near-tie."""
    wanted = golden["logits"][replay.rows]
    limit = 2 * tolerance * float(np.abs(golden["logits"]).max())
    if wrong := first_wrong_label(task, found["logits"], wanted, limit=limit):
        raise ParityError(f"{where}, {replay.name}: {wrong}", todo="do not use it")
    decided = [task.cells(task.decide(logits)) for logits in (found["logits"], wanted)]  # (B, 1) or (B, C)
    return np.asarray((decided[0] != decided[1]).any(axis=-1))


def first_wrong_label(task: Task, found: NDArray[Any], golden: NDArray[Any], *, limit: float) -> str:
    """The first decision about logits (B, C) that differs although it is further than ``limit`` from the other one."""
    for row, (theirs, ours) in enumerate(zip(found, golden, strict=True)):
        for what, wanted, given, margin in task.flips(ours, theirs):
            if margin > limit:
                return f"row {row}: {what} is {given}; expected {wanted}, which leads by {margin:.2g}"
    return ""
