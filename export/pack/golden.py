"""Golden samples: a few real ones with all that is known of them, raw and as arrays, for a device to check itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.gate.cases import sample_cases
from export.gate.reference import eager_outputs
from mope_deploy.data import Sample, Samples, open_samples
from mope_deploy.engines.golden import MOST_TOLERANCE
from mope_deploy.engines.session import Session
from mope_deploy.errors import DataError, ExportError
from mope_deploy.model import MoPE
from mope_deploy.preprocess import Preprocessing, Waveform
from mope_deploy.preprocess.audio import read_waveform
from mope_deploy.preprocess.image import upright_rgb
from mope_deploy.preprocess.video import read_clip

__all__ = [
    "FOLDER",
    "INPUTS",
    "OUTPUTS",
    "SAMPLES",
    "Golden",
    "golden_samples",
    "make_golden",
    "open_rows",
    "pick_samples",
]

FOLDER = "golden"
SAMPLES, INPUTS, OUTPUTS = f"{FOLDER}/samples.jsonl", f"{FOLDER}/inputs.npz", f"{FOLDER}/outputs.npz"

_LONGEST_SIDE = 1024  # pixels; a larger picture is shrunk before it goes into a bundle
_LONGEST_FRAME = 320  # of a video
_FLAC_CHANNELS = 8  # more it does not hold
_CANDIDATES = 4  # times as many as are wanted, where graphs of lower precision have a say
_SAFE_GAP = 1e-3  # between the last selected expert and the next one


@dataclass(frozen=True)
class Golden:
    """The files of the golden samples by their name in the bundle, and the arrays in them."""

    files: dict[str, bytes]
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]


def open_rows(model: MoPE, data: Path, *, skip_bad: bool = False) -> Samples:
    """The rows of a data file as ``model`` reads them, with or without labels; raises as :func:`open_samples`."""
    return open_samples(
        data,
        task=model.task,
        require_label=False,
        skip_bad=skip_bad,
        modalities=[spec.modality for spec in (model.config.main, *model.config.complementary)],
        optional=model.config.missing,
    )


def pick_samples(data: Path, model: MoPE, count: int, *, seed: int = 0) -> list[Sample]:
    """``count`` samples of a data file, drawn without order so that every label has its chance; fewer if it has fewer.

    Raises:
        DataError: a row that cannot be used, by file and line, or no row at all.
    """
    rows = list(open_rows(model, data))
    if not rows:
        raise DataError(f"{data} has no rows", expected="samples to check the export on")
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in order]


def golden_samples(
    model: MoPE, samples: Sequence[Sample], count: int, *, lowered: Sequence[Session] = ()
) -> list[Sample]:
    """``count`` of ``samples``: one of each label as far as they go, if possible none with a near-tie of experts.

    Args:
        model, samples, count: the reference, what to choose from, and how many.
        lowered: graphs of lower precision. Where one of them is far from the model on a sample, an expert having
            flipped, say, another sample is taken if there is one: that one would ask for a tolerance that hides faults.
    """
    steady = [sample for sample, safe in zip(samples, _is_steady(model, samples), strict=True) if safe]
    ordered = steady + [sample for sample in samples if sample not in steady]
    if lowered:
        first = _chosen(ordered, _CANDIDATES * count)
        calm = [sample for sample, near in zip(first, _is_near(model, first, lowered), strict=True) if near]
        ordered = calm + [sample for sample in ordered if sample not in calm]
    return _chosen(ordered, count)


def _chosen(ordered: Sequence[Sample], count: int) -> list[Sample]:
    """The first ones that bring a label of their own, then the first of the others."""
    chosen: list[Sample] = []
    seen: set[str] = set()
    for sample in ordered:
        labels = {sample.label} if isinstance(sample.label, str) else set(sample.label or ())
        if len(chosen) < count and labels - seen:
            chosen.append(sample)
            seen |= labels
    chosen += [sample for sample in ordered if sample not in chosen][: count - len(chosen)]
    return chosen


def make_golden(model: MoPE, samples: Sequence[Sample], *, outputs: Iterable[str]) -> Golden:
    """Write down ``samples``: rows as JSONL with their files, the input arrays made from exactly those, the outputs.

    Pictures become PNG, sounds FLAC at their own rate, videos the frames that the encoder reads, in an ``.npz``: what
    every device decodes to the same values.

    Args:
        model: the reference.
        samples: what to store.
        outputs: names of the outputs to store.

    Raises:
        ExportError: logits that are all 0.
    """
    files: dict[str, bytes] = {}
    rows, loaded = [], []
    for i, sample in enumerate(samples):
        row: dict[str, Any] = {}
        item: dict[str, Any] = {}
        # The arrays come from what is stored, as on the device, not from whatever file it was made from.
        if sample.image is not None:
            row["image"] = f"{i}.png"
            files[f"{FOLDER}/{i}.png"] = png = _png(sample.image)
            item["image"] = model.preprocessing.load_image(Image.open(io.BytesIO(png)))
        if sample.text is not None:
            row["text"] = item["text"] = sample.text
        if sample.audio is not None:
            row["audio"] = f"{i}.flac"
            files[f"{FOLDER}/{i}.flac"], stored = _flac(sample.audio, model.preprocessing)
            item["audio"] = model.preprocessing.load_audio(stored)
        if sample.video is not None:
            row["video"] = f"{i}.npz"
            frames = _clip(sample.video, model.preprocessing)
            files[f"{FOLDER}/{i}.npz"] = _npz({"frames": frames})
            item["video"] = model.preprocessing.load_video(frames)
        row["label"] = sample.label
        rows.append(row)
        loaded.append(item)
    inputs = model.preprocessing.collate(loaded)
    inputs = {name: inputs[name] for name in model.input_names}
    known = {name: array for name, array in eager_outputs(model, inputs).items() if name in set(outputs)}
    if not known["logits"].any():
        raise ExportError("the model's logits are all 0 on every golden sample, which proves nothing", todo="train it")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files |= {SAMPLES: lines.encode(), INPUTS: _npz(inputs), OUTPUTS: _npz(known)}
    return Golden(files=files, inputs=inputs, outputs=known)


def _is_steady(model: MoPE, samples: Sequence[Sample]) -> list[bool]:
    """Per sample, whether rounding cannot change which experts are selected."""
    top_k = model.config.top_k
    if not model.config.dynamic or not 0 < top_k < model.config.experts:
        return [True] * len(samples)
    found: list[bool] = []
    for case in sample_cases(model.preprocessing, samples):
        soft = -np.sort(-eager_outputs(model, case.inputs)["soft"], axis=-1)  # (B, layers, K), falling
        found += ((soft[..., top_k - 1] - soft[..., top_k]).min(axis=-1) > _SAFE_GAP).tolist()
    return found


def _is_near(model: MoPE, samples: Sequence[Sample], lowered: Sequence[Session]) -> list[bool]:
    """Per sample, whether every graph of lower precision is well within what golden samples may be off by."""
    near, scale = [], 0.0
    for case in sample_cases(model.preprocessing, samples):
        eager = eager_outputs(model, case.inputs)
        scale = max(scale, float(np.abs(eager["logits"]).max()))
        errors = dict.fromkeys(("logits", "routing"), np.zeros(len(eager["logits"])))
        for session in lowered:
            for name, array in session.run({spec.name: case.inputs[spec.name] for spec in session.inputs}).items():
                off = np.abs(array - eager[name]).reshape(len(array), -1).max(axis=1)
                errors[name] = np.maximum(errors[name], off)
        near += list(zip(errors["logits"], errors["routing"], strict=True))
    limits = MOST_TOLERANCE.logits * scale, MOST_TOLERANCE.routing
    return [all(2 * error <= limit for error, limit in zip(one, limits, strict=True)) for one in near]


def _png(path: Path) -> bytes:
    """The picture as preparing it begins: upright 8-bit RGB without metadata, lossless, and not too large.

    Shrunk only then: what Pillow makes of other modes when it resizes or saves them is not what preparing makes of
    them (16 bits of grey become white).
    """
    image = upright_rgb(path)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _flac(path: Path, preprocessing: Preprocessing) -> tuple[bytes, Waveform]:
    """What the encoder reads of a clip as FLAC, at its own rate and with its own channels; and what that decodes to."""
    import soundfile

    spec = preprocessing.audio
    assert spec is not None
    clip = read_waveform(path, seconds=spec.max_seconds, target=spec.sample_rate)
    samples = clip.samples[:, :_FLAC_CHANNELS]
    whole = samples * 2.0**15
    subtype = "PCM_16" if np.array_equal(whole, np.rint(whole)) else "PCM_24"
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, clip.rate, format="FLAC", subtype=subtype)
    buffer.seek(0)
    stored, rate = soundfile.read(buffer, dtype="float32", always_2d=True)
    return buffer.getvalue(), Waveform(stored, rate)


def _clip(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The frames that the encoder reads of a video, uint8 (F, h, w, 3), shrunk to 320 pixels a side at most."""
    assert preprocessing.video is not None

    def small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(frame)
        image.thumbnail((_LONGEST_FRAME, _LONGEST_FRAME))
        return np.asarray(image)

    return np.stack(read_clip(path, preprocessing.video, make=small))


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
