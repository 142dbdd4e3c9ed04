"""``mope run``: predict one sample, or every row of a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mope_deploy import console
from mope_deploy.cli.options import (
    AsJson,
    BatchSize,
    BundleFolder,
    EngineOptions,
    SkipBad,
    check_output,
    option,
    takes_engine_options,
)
from mope_deploy.cli.printing import print_json, print_rows, print_utf8, tell
from mope_deploy.cli.rows import open_rows, predict_rows
from mope_deploy.errors import UsageError, printable
from mope_deploy.files import reason, whole_file

if TYPE_CHECKING:
    from mope_deploy.predictor import Prediction, Predictor

__all__ = ["run"]

_MOST_LABELS = 10  # shown


@takes_engine_options()
def run(
    bundle: BundleFolder,
    image: Annotated[Path | None, option("One image file.")] = None,
    text: Annotated[str | None, option("One text.")] = None,
    audio: Annotated[Path | None, option("One sound file.")] = None,
    video: Annotated[Path | None, option("One video file.")] = None,
    data: Annotated[Path | None, option("JSONL with a row per sample: image, text, audio, video.")] = None,
    out: Annotated[Path | None, option("JSONL to write, with --data; by default standard output.")] = None,
    routing: Annotated[bool, option("Also give the experts' weights in each layer.", "--routing")] = False,
    as_json: AsJson = False,
    batch_size: BatchSize = 16,
    skip_bad: SkipBad = False,
    *,
    options: EngineOptions,
) -> None:
    """Predict one sample (--image, --text, …), or every row of a file (--data in.jsonl --out out.jsonl)."""
    # A locale that is not UTF-8 has taken the terminal's bytes for other letters.
    if text is not None and sys.getfilesystemencoding() != "utf-8":
        text = os.fsencode(text).decode("utf-8", errors="surrogateescape")
    given = {"image": image, "text": text, "audio": audio, "video": video}
    if data is not None and any(value is not None for value in given.values()):
        raise UsageError(
            "--data reads a file and --image/--text/--audio/--video give one sample", expected="one of the two"
        )
    if data is None and (out is not None or skip_bad):
        raise UsageError(
            f"{'--out' if out is not None else '--skip-bad'} belongs to --data", expected="--data in.jsonl"
        )
    if data is not None and out is not None and data.exists() and out.exists() and data.samefile(out):
        raise UsageError("--out is the file that --data reads", received=out, expected="another file")
    check_output("--out", out)
    predictor = options.load(bundle)
    if data is not None:
        samples = open_rows(predictor, data, require_label=False, skip_bad=skip_bad)
        with _writer(out) as write:
            for sample, prediction in predict_rows(predictor, samples, batch_size=batch_size, routing=routing):
                row = {"line": sample.line, **sample.named, **prediction.to_dict()}
                write(printable(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n")
        if out is not None:
            tell(f"wrote {out}")
        return
    _require_inputs(predictor, given)
    one = predictor.predict(image=image, text=text, audio=audio, video=video, routing=routing)
    assert not isinstance(one, list)
    if as_json:
        print_json(one.to_dict())
        return
    for notice in one.notices:
        tell(f"note: {notice}")
    _print(one)


def _require_inputs(predictor: Predictor, given: dict[str, Any]) -> None:
    read = predictor.bundle.manifest.modalities
    optional = predictor.preprocessing.missing
    missing = [f"--{name}" for name in read if given[name] is None and name not in optional]
    surplus = [f"--{name}" for name, value in given.items() if value is not None and name not in read]
    if missing or surplus:
        raise UsageError(
            f"{' and '.join(missing)} missing" if missing else f"this bundle reads no {surplus[0].removeprefix('--')}",
            expected=" and ".join(f"--{name}" for name in read if name not in optional)
            + "".join(f", perhaps --{name}" for name in optional)
            + ", or --data in.jsonl",
        )


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[str], object]]:
    """Write lines to standard output, or to a file that is whole or as it was."""
    if out is None:
        yield print_utf8
        return
    with whole_file(out) as path:
        try:
            file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written", received=reason(error)) from error
        with file:
            yield file.write


def _print(prediction: Prediction) -> None:
    label = prediction.label if isinstance(prediction.label, str) else ", ".join(prediction.label) or "(no label)"
    console.out.print(label, markup=False, style="bold")
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    rows = [(name, f"{probability:.4f}") for name, probability in ranked[:_MOST_LABELS]]
    if len(ranked) > _MOST_LABELS:
        rows.append((f"… {len(ranked) - _MOST_LABELS:,} more", ""))
    print_rows(rows)
    if prediction.routing is not None:
        experts = [f"expert {k + 1}" for k in range(prediction.routing.shape[1])]
        layers = ((f"layer {i + 1}", *(f"{w:.3f}" for w in weights)) for i, weights in enumerate(prediction.routing))
        print_rows(layers, header=["routing", *experts])
