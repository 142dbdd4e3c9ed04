"""A run folder: where a training run writes, what export reads (docs/architecture.md, "A run folder")."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mope_deploy.errors import CheckpointError, ConfigError, UsageError
from mope_deploy.fields import shown
from mope_deploy.files import json_bytes, reason, write_file
from train.config import Recipe
from train.recipe import check_recipe, read_recipe, to_yaml

__all__ = ["Run", "free_folder", "open_run"]

SCHEMA = 1

# What may differ when a run is continued: it changes neither the model, the data nor the order of the steps.
MAY_CHANGE = (
    "baselines", "resume", "run.dir", "run.root", "run.standalone",
    "data.check_images", "data.image_cache_mb", "data.workers",
    "train.early_stopping", "train.eval_batch_size", "train.log_every", "train.save_every", "train.tensorboard",
    "train.threads", "train.y_cache_mb",
)  # fmt: skip


class Run:
    """The files of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description, self.config = folder / "run.json", folder / "config.yaml"
        self.best, self.last, self.checkpoints = folder / "best", folder / "last", folder / "checkpoints"
        self.metrics, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.samples = folder / "samples"

    def create(self, recipe: Recipe, *, command: str, data: Mapping[str, Any]) -> None:
        """Make the folder, or take up an interrupted one, and record what is about to happen.

        Raises:
            UsageError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            todo = "choose another run.dir"
            raise UsageError(f"run folder {self.folder} cannot be made", received=reason(error), todo=todo) from error
        started = self.read().get("started") if self.description.is_file() else None
        write_file(self.config, to_yaml(recipe))
        self._describe(
            {
                "schema": SCHEMA,
                "command": command,
                "status": "running",
                "started": started or _now(),
                "checkpoint": "best",
                "data": dict(data),
                "metrics": {},
            }
        )

    def finish(self, status: str, **values: Any) -> None:
        """Record how the run ended: ``finished``, ``interrupted`` or ``failed``."""
        self._describe(self.read() | {"status": status, "ended": _now()} | values)

    def read(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            CheckpointError: it is missing, damaged or of an unknown schema.
        """
        try:
            values = json.loads(self.description.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.description} cannot be read: {error}") from error
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else values
            raise CheckpointError(f"{self.description}: schema", received=shown(found), expected=SCHEMA)
        return values

    def path(self, target: Path) -> str:
        """``target`` as ``run.json`` writes it: relative to the run where inside it, else absolute."""
        target = target.resolve()
        folder = self.folder.resolve()
        return target.relative_to(folder).as_posix() if target.is_relative_to(folder) else str(target)

    def _describe(self, values: Mapping[str, Any]) -> None:
        write_file(self.description, json_bytes(values))


def free_folder(recipe: Recipe) -> Path:
    """The folder a new run will use.

    Raises:
        UsageError: the folder that the recipe names is taken.
    """
    if recipe.run.dir is not None:
        folder = Path(recipe.run.dir).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            taken = "is a file" if not folder.is_dir() else "exists and is not empty"
            todo = "choose another run.dir"
            if (folder / "run.json").is_file():
                todo += f", or continue it: python -m train --resume {folder}"
            raise UsageError(f"run folder {folder} {taken}", todo=todo)
        return folder
    stem = Path(recipe.run.root).expanduser() / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = stem, 2
    while folder.exists():
        folder = stem.with_name(f"{stem.name}-{number}")
        number += 1
    return folder


def open_run(folder: str | Path, *, recipe: Mapping[str, Any] | None, overrides: Iterable[str]) -> tuple[Run, Recipe]:
    """An existing run and the recipe to continue it with.

    Args:
        folder: the run folder.
        recipe: the raw recipe that the user gave again, or None.
        overrides: ``dotted.key=value``; only keys that do not change the result may differ from the run's own.

    Raises:
        UsageError: no such run.
        ConfigError: the recipe asks for another run than this one.
        CheckpointError: the run's own files are damaged.
    """
    run = Run(Path(folder).expanduser())
    if not run.config.is_file() or not run.description.is_file():
        raise UsageError(
            f"{folder} is no run folder", expected="run.json and config.yaml, as python -m train writes them"
        )
    own = read_recipe(str(run.config))
    before = check_recipe(own, what=f"{run.config}")
    after = check_recipe(own if recipe is None else recipe, list(overrides), what="the recipe to continue with")
    _refuse_changes(before, after, run)
    length = ("epochs", "max_steps", "early_stopping")
    same_length = all(getattr(before.train, key) == getattr(after.train, key) for key in length)
    if run.read()["status"] == "finished" and same_length:
        raise UsageError(
            f"{folder} is finished",
            todo=f"look at {run.folder}/evaluation.json; for more, raise train.epochs (not under the cosine schedule)",
        )
    section = after.run.model_copy(update={"dir": str(run.folder)})
    return run, after.model_copy(update={"resume": True, "run": section})


def _refuse_changes(before: Recipe, after: Recipe, run: Run) -> None:
    old, new = _flat(before.to_dict()), _flat(after.to_dict())
    may_change = set(MAY_CHANGE)
    if before.optim.schedule != "cosine":
        may_change |= {"train.epochs", "train.max_steps"}  # under cosine every learning rate depends on the last step
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in may_change]
    if changed:
        shown_changes = ", ".join(f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ConfigError(
            f"the recipe is not the one that {run.folder} was started with",
            received=f"changes of {shown_changes}{more}",
            expected=f"at most changes of {', '.join(sorted(may_change - {'resume', 'run.dir', 'run.root'}))}",
            todo="start a new run for other settings",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {name: leaf for key, value in values.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): values}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
