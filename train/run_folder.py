"""A run folder: where a training run writes, what export reads (docs/architecture.md, "A run folder")."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mope_deploy.errors import CheckpointError, ConfigError, UsageError
from mope_deploy.fields import decode, shown
from mope_deploy.files import claim, json_bytes, locked, reason, recover, write_file
from mope_deploy.reading import read_json
from train.config import Recipe
from train.recipe import check_recipe, read_recipe, to_yaml

__all__ = ["COMPLETE", "Run", "free_folder", "open_run", "open_trained", "working_in"]

SCHEMA = 1
COMPLETE = "complete.json"  # of a resume state; written last

# What may differ when a run is continued: it changes neither the model, the data, the order of the steps nor the bits
# of what is computed. The batches that y is computed in (train.eval_batch_size, train.y_cache_mb) change its last bits.
MAY_CHANGE = (
    "baselines", "resume", "run.dir", "run.root", "run.standalone",
    "data.image_cache_mb", "data.workers",
    "train.early_stopping", "train.log_every", "train.save_every", "train.tensorboard", "train.threads",
)  # fmt: skip

EVALUATION = (  # what may differ when only the evaluation is repeated
    "baselines", "data.check_images", "data.image_cache_mb", "data.skip_bad", "run.standalone",
    "train.device", "train.eval_batch_size", "train.threads",
)  # fmt: skip


class Run:
    """The files of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description, self.config = folder / "run.json", folder / "config.yaml"
        self.best, self.last, self.checkpoints = folder / "best", folder / "last", folder / "checkpoints"
        self.metrics, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.samples = folder / "samples"

    @property
    def states(self) -> dict[int, Path]:
        """The complete resume states by step, oldest first; folders with any other name are nobody's business."""
        found = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            if (name := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and (path / COMPLETE).is_file():
                found[int(name[1])] = path
        return dict(sorted(found.items()))

    def create(self, recipe: Recipe, *, command: str, resumed: bool, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Record what is about to happen, in a folder that is new, was never begun, or is continued.

        Killed at any moment in here, a new run can be started anew and a continued one continued: ``run.json`` says
        first whose folder it is, and a folder without ``config.yaml``, which comes last, has not begun.

        Args:
            recipe: what is trained.
            command: what the user typed.
            resumed: whether the run is continued.
            describe: writes rows that the run keeps, and returns ``run.json``'s ``data``.

        Raises:
            UsageError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            todo = "choose another run.dir"
            raise UsageError(f"run folder {self.folder} cannot be made", received=reason(error), todo=todo) from error
        before = self.read() if resumed else {"started": _now(), "data": {}}
        values = {
            "schema": SCHEMA,
            "command": command,
            "status": "running",
            "started": before["started"],
            "checkpoint": "best",
            "data": before["data"],
            "metrics": {},
        }
        self._describe(values)
        if not resumed:
            self._clear()
        self._describe(values | {"data": dict(describe())})
        write_file(self.config, to_yaml(recipe))

    def recover(self) -> None:
        """Put back what a killed process took away to replace it."""
        for folder in (self.best, self.last):
            recover(folder)

    def _clear(self) -> None:
        """Remove what an earlier start left that came to nothing."""
        self.config.unlink(missing_ok=True)
        self.metrics.unlink(missing_ok=True)
        for folder in (self.best, self.last, self.checkpoints, self.tensorboard, self.samples):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, status: str, **values: Any) -> None:
        """Record how far it came: ``trained`` to its end, ``finished`` (evaluated too), ``interrupted``, ``failed``."""
        self._describe(self.read() | {"status": status, "ended": _now()} | values)

    def read(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            CheckpointError: it is missing, damaged or of an unknown schema.
        """
        try:
            values = read_json(self.description)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.description} cannot be read: {reason(error)}") from error
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else values
            raise CheckpointError(f"{self.description}: schema", received=shown(found), expected=SCHEMA)
        self._check(values, status=str, started=str, data=dict[str, Any], metrics=dict[str, Any])
        return values

    def trained_on(self) -> dict[str, Any]:
        """``data`` of :meth:`read`, of a run whose training is done.

        Raises:
            CheckpointError: as :meth:`read`; or the run never got as far as to write it.
        """
        data: dict[str, Any] = self.read()["data"]
        self._check(data, "data.", labels=list[str], rows=dict[str, Any], fingerprint=dict[str, Any])
        return data

    def _check(self, values: Mapping[str, Any], prefix: str = "", /, **kinds: Any) -> None:
        for key, kind in kinds.items():
            decode(values.get(key), kind, f"{self.description}: {prefix}{key}", CheckpointError)

    def path(self, target: Path) -> str:
        """``target`` as ``run.json`` writes it: relative to the run where inside it, else absolute."""
        target = target.resolve()
        folder = self.folder.resolve()
        return target.relative_to(folder).as_posix() if target.is_relative_to(folder) else str(target)

    def _describe(self, values: Mapping[str, Any]) -> None:
        write_file(self.description, json_bytes(values))


def free_folder(recipe: Recipe) -> Path | None:
    """The folder that a recipe names for a new run; None where it leaves the choice to us.

    A folder in which a run was begun that came to nothing (stopped before its first resume state) is free.

    Raises:
        UsageError: it is taken.
    """
    if recipe.run.dir is None:
        return None
    folder = Path(recipe.run.dir).expanduser()
    if folder.is_dir() and not _taken(Run(folder)):
        return folder
    if folder.exists():
        taken = "is a file" if not folder.is_dir() else "exists and is not empty"
        todo = "choose another run.dir"
        if (folder / "run.json").is_file():
            todo += f", or continue it: python -m train --resume {folder}"
        raise UsageError(f"run folder {folder} {taken}", todo=todo)
    return folder


@contextmanager
def working_in(recipe: Recipe, *, resume: Run | None) -> Iterator[Run]:
    """The folder of a new run or of one to continue, in which no other process works while the block runs.

    A folder that was made here and in which nothing was written is removed.

    Raises:
        UsageError: it is taken, or another process works in it.
    """
    with ExitStack() as stack:
        folder = free_folder(recipe) if resume is None else resume.folder
        if folder is None:
            folder = _claim_new(recipe, stack)
        elif resume is None and not (folder.is_dir() and any(folder.iterdir())):
            stack.enter_context(claim(folder))
        stack.enter_context(locked(folder))
        if resume is None and recipe.run.dir is not None:
            free_folder(recipe)  # another run may have come and gone before it was locked
        run = Run(folder)
        run.recover()
        yield run


def _claim_new(recipe: Recipe, stack: ExitStack) -> Path:
    stem = Path(recipe.run.root).expanduser() / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = stem, 1
    while True:
        if not folder.exists():
            try:
                stack.enter_context(claim(folder))
                return folder
            except UsageError:
                if not folder.exists():
                    raise
        number += 1
        folder = stem.with_name(f"{stem.name}-{number}")


def _taken(run: Run) -> bool:
    """Whether a folder holds anything but what a run leaves that was stopped before its first resume state."""
    ours = {"run.json", "config.yaml", "metrics.jsonl", "best", "last", "checkpoints", "tensorboard", "samples"}
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    left = {name for name in names if name.endswith((".tmp", ".old")) and name[1:].rsplit(".", 2)[0] in ours}
    if names == {name for name in left if name.endswith(".tmp")}:
        return False
    try:
        status = run.read()["status"]
    except CheckpointError:
        return True
    # What was trained for long is never taken for nothing, even if somebody removed its resume states.
    trained = status != "running" and (run.best.exists() or any(run.folder.glob(".best.*.old")))
    return bool(names - left - ours) or bool(run.states) or trained or status in ("trained", "finished")


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
        todo = "start it again with the command that began it" if run.description.is_file() else None
        raise UsageError(
            f"{folder} is no run folder", expected="run.json and config.yaml, as python -m train writes them", todo=todo
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


def open_trained(folder: str | Path, *, overrides: Iterable[str]) -> tuple[Run, Recipe]:
    """A run whose training is done, and the recipe to evaluate it with once more.

    Args:
        folder: the run folder.
        overrides: ``dotted.key=value`` of what concerns the evaluation.

    Raises:
        UsageError: no such run, or it is not trained to its end.
        ConfigError: an override of something else.
        CheckpointError: the run's own files are damaged.
    """
    run = Run(Path(folder).expanduser())
    if not run.config.is_file() or not run.description.is_file():
        raise UsageError(
            f"{folder} is no run folder", expected="run.json and config.yaml, as python -m train writes them"
        )
    status = run.read().get("status")
    if status not in ("trained", "finished"):
        raise UsageError(
            f"{folder} is not trained to its end",
            received=f"status {shown(status)}",
            todo=f"continue it: python -m train --resume {folder}",
        )
    own = read_recipe(str(run.config))
    before = check_recipe(own, what=f"{run.config}")
    after = check_recipe(own, list(overrides), what="the recipe to evaluate with")
    _refuse(before, after, run, may_change={*EVALUATION})
    return run, after


def _refuse_changes(before: Recipe, after: Recipe, run: Run) -> None:
    may_change = set(MAY_CHANGE)
    if not before.data.skip_bad:
        may_change |= {"data.check_images"}  # else it decides which rows are left out
    if before.optim.schedule != "cosine":
        may_change |= {"train.epochs", "train.max_steps"}  # under cosine every learning rate depends on the last step
    _refuse(before, after, run, may_change=may_change)


def _refuse(before: Recipe, after: Recipe, run: Run, *, may_change: set[str]) -> None:
    old, new = _flat(before.to_dict()), _flat(after.to_dict())
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
