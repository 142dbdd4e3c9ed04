"""How to export, checked before anything slow is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from export.limits import (
    CALIBRATION_SAMPLES,
    DEFAULT_OPSET,
    FOLDS,
    GATE_SAMPLES,
    METHODS,
    OPSETS,
    REPAIR_MINUTES,
    THRESHOLD_NAMES,
)
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import UsageError
from mope_deploy.fields import nearest
from mope_deploy.limits import MAX_THREADS
from mope_deploy.manifest import PRECISIONS
from mope_deploy.targets import get_target

__all__ = ["Options", "check_names", "check_opset", "parse_list", "parse_thresholds"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export.

    Attributes:
        name: what the bundle calls itself.
        opset: of the standard operators, 17 to 20.
        fold: how prompts enter the layers, one of :data:`FOLDS`.
        fuse: also write a variant fused for ONNX Runtime.
        routing: whether the graph has the output ``routing``.
        samples: real samples the gate compares on; None for as many as give it 128 logits.
        overwrite: replace a bundle at the target.
        seed: of the generated batches and of the choice of samples.
        precisions: of the graphs, of :data:`mope_deploy.manifest.PRECISIONS`; the first is what runs by default.
        gate_samples: real samples that precisions below fp32 are judged on; fewer if there are fewer.
        thresholds: what precisions below fp32 have to reach instead of the defaults
            (:data:`export.gate.THRESHOLDS`), shares of 1 by :data:`THRESHOLD_NAMES`.
        calibration_samples: real samples at most that int8 reads its ranges from, and layers are ranked on in a repair.
        calibration_method: how outliers among them are cut, one of :data:`METHODS`.
        repair_minutes: that each precision below fp32 may take to find out what has to stay in fp32.
        skip_bad: leave rows out that int8 cannot be calibrated on, as the model was trained without them.
        target: name of a device preset (:data:`mope_deploy.targets.TARGETS`) that every graph must suit; or None.
        batch, text_length, audio_length: ``min:opt:max`` that engines are built for; None for the target's, else for
            the library's user to choose.
        workspace: limit of the builder's scratch memory in MiB; None for the target's.
        split: every graph in several files, a part for each complementary modality and the main one.
        cpu_threads: of sessions on a CPU, unless the device says otherwise; None for as many as the process may use.
        cpu_arena: whether such sessions keep memory for their next run.
    """

    name: str = "mope"
    opset: int = DEFAULT_OPSET
    fold: str = "auto"
    fuse: bool = False
    routing: bool = True
    samples: int | None = None
    overwrite: bool = False
    seed: int = 0
    precisions: tuple[str, ...] = ("fp32",)
    gate_samples: int = GATE_SAMPLES
    thresholds: Mapping[str, float] = field(default_factory=dict)
    calibration_samples: int = CALIBRATION_SAMPLES
    calibration_method: str = METHODS[0]
    repair_minutes: float = REPAIR_MINUTES
    skip_bad: bool = False
    target: str | None = None
    batch: str | None = None
    text_length: str | None = None
    audio_length: str | None = None
    workspace: int | None = None
    split: bool = False
    cpu_threads: int | None = None
    cpu_arena: bool = True

    def __post_init__(self) -> None:
        check_opset(self.opset)
        for what in ("samples", "gate_samples", "calibration_samples"):
            count = getattr(self, what)
            if count is not None and count < 1:
                raise UsageError(what.replace("_", " "), received=count, expected="at least 1")
        check_names("precision", self.precisions, PRECISIONS)
        check_names("--fold", (self.fold,), FOLDS)
        for name, share in self.thresholds.items():
            check_names("threshold", (name,), THRESHOLD_NAMES)
            if not 0 <= share <= 1:
                raise UsageError(f"the threshold {name}", received=share, expected="a share from 0 to 1")
        if not 0 < self.repair_minutes <= 10_000:
            raise UsageError("--repair-minutes", received=self.repair_minutes, expected="more than 0, up to 10,000")
        check_names("calibration method", (self.calibration_method,), METHODS)
        if self.target is not None:
            get_target(self.target).check(opset=self.opset, precisions=self.precisions)
        for axis, sizes in self.profile().items():
            Sizes.parse(sizes, axis=axis)
        if self.workspace is not None and not 1 <= self.workspace <= 2**20:
            raise UsageError("--workspace", received=self.workspace, expected="1 to 1,048,576 MiB")
        if self.cpu_threads is not None and not 1 <= self.cpu_threads <= MAX_THREADS:
            raise UsageError("--cpu-threads", received=self.cpu_threads, expected=f"1 to {MAX_THREADS:,}")
        if self.split and "bf16" in self.precisions:
            raise UsageError(
                "graphs in parts are for ONNX Runtime, and bf16 is for TensorRT alone",
                received="--split with bf16",
                todo="leave bf16 or --split out",
            )
        if self.fuse and "fp32" not in self.precisions:
            raise UsageError(
                "a fused variant is made of the fp32 graph",
                received=f"precisions {', '.join(self.precisions)}",
                todo="add fp32 to --precision, or leave --fuse out",
            )
        if not self.name.strip() or len(self.name) > 200:
            raise UsageError("the bundle's name", received=repr(self.name[:60]), expected="1 to 200 characters")

    def profile(self) -> dict[str, str]:
        """Axis → ``min:opt:max`` that engines are built for, as far as it was asked for or the target says so."""
        preset = get_target(self.target) if self.target is not None else None
        batch = self.batch or (preset.batch if preset else None)
        text_length = self.text_length or (preset.text_length if preset else None)
        asked = {"batch": batch, "text_length": text_length, "audio_length": self.audio_length}
        return {axis: sizes for axis, sizes in asked.items() if sizes is not None}


def parse_list(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in ``"fp32, int8"``, each one of ``known`` and once.

    Raises:
        UsageError: a name that is not known, twice the same, or none.
    """
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    check_names(option, names, known)
    return names


def parse_thresholds(text: str) -> dict[str, float]:
    """``"labels=0.98,metric=0.02"`` by name.

    Raises:
        UsageError: something else, or one name twice.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            raise UsageError("--threshold", received=repr(part[:60]), expected="like labels=0.98,metric=0.02") from None
        if name in found:
            raise UsageError("--threshold", received=text[:60], expected="each name once")
        found[name] = share
    return found


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Every one of ``names`` is known and stands there once.

    Raises:
        UsageError: naming the first that is not.
    """
    expected = f"of: {', '.join(known)}"
    if not names:
        raise UsageError(what, received="nothing", expected=f"at least one {expected}")
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise UsageError(
                f"there is no {what} {name!r}",
                expected=f"one {expected}",
                todo=f"did you mean {hint}?" if hint else None,
            )
    if len(set(names)) != len(names):
        raise UsageError(what, received=", ".join(names), expected="each name once")


def check_opset(opset: int) -> int:
    """``opset`` if every target reads it.

    Raises:
        UsageError: naming the range.
    """
    if opset not in OPSETS:
        raise UsageError(
            "the opset",
            received=opset,
            expected=f"{OPSETS.start} to {OPSETS.stop - 1}",
            todo=f"{DEFAULT_OPSET} is the safest",
        )
    return opset
