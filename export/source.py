"""What the user points at: a run folder, one of its checkpoints, a checkpoint folder on its own, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope_deploy.errors import CheckpointError, UsageError
from mope_deploy.manifest import MANIFEST

if TYPE_CHECKING:
    from mope_deploy.model import MoPE

__all__ = ["Source", "find_source"]

RUN, CONFIG, WEIGHTS = "run.json", "config.json", "model.safetensors"
RUN_SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """A trained model and the data to check it on.

    Attributes:
        name: what to call the bundle unless the user says otherwise.
        checkpoint: folder, or hub id.
        data: JSONL of real samples to compare on.
        calibration: JSONL of real samples to read ranges of activations from: the run's training split where it
            recorded one, so that nothing is judged on what it was calibrated with.
        skip_bad: whether rows that cannot be used were left out in training.
        where: what messages and commands call the source: as the user gave it.
    """

    name: str
    checkpoint: str
    data: Path
    calibration: Path
    where: str
    skip_bad: bool = False

    def load(self) -> MoPE:
        """The trained model, in evaluation mode.

        Raises:
            CheckpointError: damaged, incomplete, or for encoders with other weights.
        """
        from mope_deploy.model import MoPE

        return MoPE.from_pretrained(self.checkpoint)


def find_source(given: str | Path, *, data: str | Path | None = None) -> Source:
    """Find checkpoint and data.

    Args:
        given: a run folder, one of its checkpoint folders (``RUN/best``), or with ``data`` any checkpoint or hub id.
        data: JSONL of samples instead of the run's own test split.

    Raises:
        UsageError: ``given`` is something else, or there is no data.
        CheckpointError: a run that is unfinished or damaged.
    """
    path, where = Path(given).expanduser(), str(given)
    if (path / MANIFEST).is_file():
        raise UsageError(
            f"{where} is a bundle, exported already",
            expected="a run folder or a checkpoint",
            todo=f"run it: mope info {where}; to compare it with its run: mope-export check RUN {where}",
        )
    if (path / RUN).is_file():
        description = _read_run(path)
        checkpoint, splits = str(_best(path, where, description)), _splits(path, description)
        skipped = _skipped(description)
        name = path.resolve().name
    elif (path / CONFIG).is_file():
        run = path.resolve().parent
        description = _read_run(run) if (run / RUN).is_file() else {}
        splits, skipped = _splits(run, description), _skipped(description)
        checkpoint, name = str(path), run.name if _tested(splits) is not None else path.resolve().name
    # Of two words with a slash between them, the first one being a folder here, the second was meant to be in it.
    elif path.exists() or not _is_hub_id(where) or (data is None and path.parent.is_dir()):
        raise _nothing(path, where)
    else:
        checkpoint, name, splits, skipped = where, where.rpartition("/")[2], {}, False
    compared = _data(data, _tested(splits), where)
    recorded = [splits[split] for split in ("train", "validation") if split in splits and splits[split].is_file()]
    return Source(name, checkpoint, compared, recorded[0] if recorded else compared, where, skipped)


def _best(run: Path, where: str, description: dict[str, Any]) -> Path:
    """The best checkpoint of a finished run."""
    best = run / str(description.get("checkpoint", "best"))
    has_best = (best / CONFIG).is_file() and (best / WEIGHTS).is_file()
    if description.get("status") != "finished":
        todo = f"continue it: python -m train --resume {where}"
        if has_best:
            todo += f"; or export the best checkpoint so far: mope-export {where}/{best.name}"
        raise CheckpointError(
            f"the run {where} is not finished", received=f"status {description.get('status')!r}", todo=todo
        )
    if not has_best:
        raise CheckpointError(f"the run {where} has no checkpoint {best.name}", expected=f"{best / WEIGHTS}")
    return best


def _read_run(run: Path) -> dict[str, Any]:
    path = run / RUN
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("schema") != RUN_SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f"{path}: schema", received=found, expected=RUN_SCHEMA)
    return description


def _splits(run: Path, description: dict[str, Any]) -> dict[str, Path]:
    """Where each split is that the run recorded."""
    recorded = description.get("data")
    found = recorded.items() if isinstance(recorded, dict) else ()
    return {name: run / place for name, place in found if isinstance(place, str)}  # an absolute path stays itself


def _skipped(description: dict[str, Any]) -> bool:
    """Whether training left rows out: it does so only where it was told to (data.skip_bad)."""
    recorded = description.get("data")
    return isinstance(recorded, dict) and bool(recorded.get("skipped"))


def _tested(splits: dict[str, Path]) -> Path | None:
    return splits.get("test", splits.get("validation"))


def _data(given: str | Path | None, recorded: Path | None, where: str) -> Path:
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UsageError(f"--data {given} is not a file", expected="a JSONL file of image, text, label")
        return path
    if recorded is None:
        raise UsageError(
            f"{where} comes without data to check the export on",
            todo="add --data samples.jsonl, real samples as the model will see them",
        )
    if not recorded.is_file():
        raise UsageError(
            f"the data of {where} is not at {recorded} any more", todo="give its place: --data samples.jsonl"
        )
    return recorded


def _nothing(path: Path, where: str) -> UsageError:
    """What ``path`` is, where nothing can be exported from it."""
    expected = (
        "a run folder (run.json), a checkpoint folder (config.json and model.safetensors) with --data, or a hub id"
    )
    if not path.exists():
        return UsageError(f"there is nothing at {where}", expected=expected)
    if path.is_file():
        return UsageError(f"{where} is a file", expected=expected)
    runs = sorted(found.parent for found in path.glob(f"*/{RUN}"))
    received = "an empty folder" if not any(path.iterdir()) else "a folder without run.json or config.json"
    return UsageError(
        f"{where} holds no trained model",
        received=received,
        expected=expected,
        todo=f"did you mean {runs[-1]}?" if runs else None,
    )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
