"""Checks of what was asked for that need more than the options: the target, the model, the finished graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.options import Options
from mope_deploy import bundle
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import UsageError
from mope_deploy.manifest import MANIFEST
from mope_deploy.targets import get_target

if TYPE_CHECKING:
    from mope_deploy.model import MoPE

__all__ = ["check_device", "check_sizes", "check_split", "check_target"]


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target before any work; :func:`mope_deploy.bundle.write_bundle` decides again when it writes.

    Raises:
        UsageError: something is there that may not be replaced.
    """
    try:
        bundle.check_target(target, overwrite=overwrite)
    except UsageError as error:
        if (target / MANIFEST).is_file():
            raise UsageError(error.what, todo="choose another name with --out, or add --overwrite") from error
        raise


def check_sizes(model: MoPE, options: Options) -> dict[str, Sizes]:
    """Sizes that engines are built for, as far as the export was told, by axis.

    Raises:
        UsageError: sizes that the model's preprocessing never makes.
    """
    profile = {axis: Sizes.parse(sizes, axis=axis) for axis, sizes in options.profile().items()}
    words, text = profile.get("text_length"), model.preprocessing.text
    if words is not None and (text is None or words.max > text.max_length):
        most = text and f"at most {text.max_length:,} tokens: longer texts are cut to that"
        raise UsageError("--text-len", received=words, expected=most or "nothing: this model reads no text")
    clip, sound = profile.get("audio_length"), model.preprocessing.audio
    if clip is not None and (sound is None or clip.min < sound.min_samples or clip.max > sound.max_samples):
        range_ = sound and f"{sound.min_samples:,} to {sound.max_samples:,} samples"
        raise UsageError("--audio-len", received=clip, expected=range_ or "nothing: this model hears nothing")
    return profile


def check_split(model: MoPE, options: Options, *, engines: bool = False) -> None:
    """Whether graphs can be in parts, where that was asked for.

    Raises:
        UsageError: engines are to be built of them, or the main modality is not conditioned by another one.
    """
    if not options.split:
        return
    if engines:
        raise UsageError(
            "no engine is built from graphs in parts",
            received="--split with --format trt",
            expected="--format onnx",
            todo="export two bundles",
        )
    if not model.config.complementary or not (model.config.dynamic or model.config.mapped):
        raise UsageError(
            "--split has nothing to take out of this model",
            received="no prompt that depends on a complementary modality",
            expected="a model with dynamic or mapped prompts",
            todo="leave --split out",
        )


def check_device(options: Options, graphs: Sequence[tuple[str, Sequence[Path]]]) -> None:
    """Every final graph suits the device that the export is for, if it is for one.

    Args:
        options: as asked for.
        graphs: precision and ONNX files of each graph.

    Raises:
        ExportError: an operator that the device does not take.
    """
    import onnx

    if options.target is None:
        return
    for precision, files in graphs:
        nodes = [node for file in files for node in onnx.load(file, load_external_data=False).graph.node]
        ops = {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes}
        get_target(options.target).check(opset=options.opset, precisions=(precision,), ops=ops)
