"""How to export, checked before anything slow is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mope_deploy.errors import UsageError
from mope_deploy.manifest import MANIFEST

__all__ = ["DEFAULT_OPSET", "MAX_IR_VERSION", "OPSETS", "Options", "check_opset", "check_target"]

OPSETS = range(17, 21)  # what the TensorRT parsers and ONNX Runtime 1.18 all read
DEFAULT_OPSET = 18
MAX_IR_VERSION = 10  # the newest that ONNX Runtime 1.18 (JetPack 6) reads


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export.

    Attributes:
        name: what the bundle calls itself.
        opset: of the standard operators, 17 to 20.
        fuse: also write a variant fused for ONNX Runtime.
        routing: whether the graph has the output ``routing``.
        samples: real samples the gate compares on; None for as many as give it 128 logits.
        overwrite: replace a bundle at the target.
        seed: of the generated batches and of the choice of samples.
    """

    name: str = "mope"
    opset: int = DEFAULT_OPSET
    fuse: bool = False
    routing: bool = True
    samples: int | None = None
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_opset(self.opset)
        if self.samples is not None and self.samples < 1:
            raise UsageError("samples", received=self.samples, expected="at least 1")
        if not self.name.strip() or len(self.name) > 200:
            raise UsageError("the bundle's name", received=repr(self.name[:60]), expected="1 to 200 characters")


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


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target before any work; :func:`mope_deploy.bundle.write_bundle` decides again when it writes.

    Raises:
        UsageError: something is there that may not be replaced.
    """
    if not target.is_symlink() and not target.exists():
        return
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise UsageError(f"{target} exists and is not a bundle, so it is not replaced", todo="choose another name")
    if not overwrite:
        raise UsageError(f"{target} exists", todo="choose another name with --out, or add --overwrite")
