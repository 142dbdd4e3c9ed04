"""One training run from a checked recipe to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from mope_deploy.console import err
from mope_deploy.data import fingerprint
from mope_deploy.errors import MopeError, UsageError
from mope_deploy.files import locked
from mope_deploy.model import MoPE, build_model
from mope_deploy.model.tensors import read_tensors
from train.config import Recipe
from train.data import Batches, MediaCache, find_splits
from train.data.rows import decode, describe, read_rows, refuse_other_data
from train.features import Features, cacheable, fit_statistics, standardised
from train.interruption import Interruption
from train.loop import SCORES, Loop
from train.machine import Machine, check_room, set_up
from train.objective import Objective
from train.reporting import again, report
from train.resume import newest
from train.run_folder import Run, working_in

__all__ = ["Outcome", "Plan", "Training", "evaluate_again", "fit", "plan"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, ``finished`` or ``interrupted``, and the content of ``evaluation.json``."""

    run: Run
    status: str
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a dry run found out: rows of each split (None if not generated yet), parameters, optimiser steps."""

    rows: dict[str, int] | None
    labels: tuple[str, ...]
    parameters: dict[str, int]
    steps: int | None


def fit(recipe: Recipe, *, command: str, resume: Run | None = None) -> Outcome:
    """Train, evaluate and report.

    Args:
        recipe: a checked recipe.
        command: what the user typed, for the record.
        resume: the run to continue, whose recipe this is; None starts a new one.

    Returns:
        The outcome; ``interrupted`` after SIGINT or SIGTERM, with a resume state if training had begun.

    Raises:
        MopeError: whatever is wrong with recipe, data or machine; before the first step nothing was written.
    """
    machine, interruption = set_up(recipe), Interruption()
    with interruption.handled(), _quiet(unless=machine.writes), ExitStack() as stack:
        run = stack.enter_context(working_in(recipe, resume=resume)) if machine.writes else None
        run = Run(machine.agree(None if run is None else run.folder))
        training = Training(recipe, machine, interruption, run=run, resumed=resume is not None)
        return training.carry_out(command)


def evaluate_again(recipe: Recipe, run: Run) -> Outcome:
    """Repeat the evaluation of a trained run, on the rows as they are now.

    Args:
        recipe: the run's own, see :func:`train.run_folder.open_trained`.
        run: it.

    Raises:
        MopeError: whatever is wrong with model, rows or machine.
    """
    machine = set_up(recipe)
    if machine.processes > 1:
        raise UsageError("--evaluate", received=f"{machine.processes} processes", expected="one, without torchrun")
    with Interruption().handled(), locked(run.folder):
        run.recover()
        data = run.trained_on()
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"labels": tuple(data["labels"])})})
        model = MoPE.from_pretrained(run.best).to(machine.device)
        media = MediaCache(model.preprocessing, limit_mb=recipe.data.image_cache_mb)
        features = Features(media, machine.device, batch_size=recipe.train.eval_batch_size)
        split, others = again(run, recipe, media, threads=machine.threads)
        if recipe.run.standalone:
            model.save_pretrained(run.best, standalone=True)
        evaluation = report(run, recipe, model, features, split, others=others)
        before = run.read()
        metrics = before["metrics"] | {split.name: {name: evaluation[name] for name in SCORES}}
        fingerprints = dict(data["fingerprint"])
        if split.name in fingerprints and not split.source.resolve().is_relative_to(run.folder.resolve()):
            fingerprints[split.name] = fingerprint(split.source)
        rows = data["rows"] | {split.name: len(split)}
        run.finish("finished", metrics=metrics, data=data | {"fingerprint": fingerprints, "rows": rows})
    return Outcome(run, "finished", evaluation)


def plan(recipe: Recipe) -> Plan:
    """Check what can be checked without writing: machine, rows, labels, files, encoders, room on the disk, and that a
    batch goes through the model.

    Raises:
        MopeError: whatever is wrong.
    """
    machine = set_up(recipe)
    files = find_splits(recipe.data, task=recipe.model.make_task(), fetch=False)
    data = None if files is None else read_rows(recipe, files)
    labels = recipe.model.labels if data is None else data.train.labels
    model = _build(recipe, labels or ("?", "??"))
    parameters = _parameters(model)
    _check_room(recipe, Path(recipe.run.dir or recipe.run.root).expanduser(), parameters)
    if data is None:
        return Plan(None, labels, parameters, None)
    data, media = decode(recipe, data, model.preprocessing, threads=machine.threads)
    batches = Batches(data.train, media)
    size = min(len(batches), recipe.train.batch_size // (machine.processes * recipe.train.accumulation))
    with torch.no_grad():
        batch = send_to_device(batches.__getitems__(range(size)), machine.device)
        _objective(recipe, model.to(machine.device)).train()(**batch)
    per_epoch = -(-len(data.train) // recipe.train.batch_size)
    steps = recipe.train.max_steps or per_epoch * recipe.train.epochs
    _advise(recipe, steps)
    return Plan({split.name: len(split) for split in data.splits}, labels, parameters, steps)


class Training:
    """The state of a run. To make one reads and checks everything and writes nothing; arguments and errors as
    :func:`fit`'s, with the machine to train on, whether the run is to stop, its folder and whether it is continued.
    """

    def __init__(
        self, recipe: Recipe, machine: Machine, interruption: Interruption, *, run: Run, resumed: bool
    ) -> None:
        self.recipe, self.machine, self.interruption = recipe, machine, interruption
        self.run, self.resumed = run, resumed
        self.state = newest(run) if resumed else None
        with machine.state.main_process_first():
            files = find_splits(recipe.data, task=recipe.model.make_task())
        assert files is not None
        data = read_rows(recipe, files)
        self.model = _build(recipe, data.train.labels)
        self.parameters = _parameters(self.model)
        _check_room(recipe, run.folder, self.parameters)
        self.data, media = decode(recipe, data, self.model.preprocessing, threads=machine.threads)
        self.features = Features(media, machine.device, batch_size=recipe.train.eval_batch_size)
        if resumed:
            refuse_other_data(run, self.data)

    def carry_out(self, command: str) -> Outcome:
        """Prepare, train and report, and record how it ended."""
        started = time.monotonic()
        if self.machine.writes:
            self.run.create(
                self.recipe,
                command=command,
                resumed=self.resumed,
                describe=lambda: describe(self.run, self.data, self.recipe),
            )
        try:
            self._announce()
            loop = self.prepare()
            _advise(self.recipe, loop.steps)
            prepared = time.monotonic()
            finished = loop.train()
            trained = time.monotonic()
            self.machine.state.wait_for_everyone()
            if dist.is_initialized():
                dist.destroy_process_group()  # what follows training is the work of one process
            if not finished:
                self._finish("interrupted", step=loop.progress.step)
                return Outcome(self.run, "interrupted", {})
            if not self.machine.writes:
                return Outcome(self.run, "finished", {})
            score, epoch = loop.progress.best
            seconds = {"preparation": round(prepared - started, 1), "training": round(trained - prepared, 1)}
            known: dict[str, Any] = {
                "metrics": {"validation": {loop.metric: score, "epoch": epoch}},
                "parameters": self.parameters,
                "steps": loop.progress.step,
                "seconds": seconds,
                "machine": self.machine.describe(),
            }
            self._finish("trained", **known)
        except KeyboardInterrupt:
            self._finish("interrupted")
            return Outcome(self.run, "interrupted", {})
        except BaseException:
            with suppress(MopeError):  # a full disk, which is what failed
                self._finish("failed")
            raise
        # From here on nothing costs the training: its run stays "trained", and can be evaluated again.
        try:
            evaluation = self.report()
        except KeyboardInterrupt:
            return Outcome(self.run, "interrupted", {})
        except Exception:
            err.print(
                f"note: the model is trained and kept in {self.run.best}; when what follows is mended, repeat the "
                f"evaluation: python -m train --evaluate {self.run.folder}",
                markup=False,
            )
            raise
        known["metrics"][evaluation["split"]] = {name: evaluation[name] for name in SCORES}
        seconds["evaluation"] = round(time.monotonic() - trained, 1)
        self._finish("finished", **known)
        return Outcome(self.run, "finished", evaluation)

    def prepare(self) -> Loop:
        """Training and validation batches, with y computed once where nothing that trains can change it."""
        recipe, model = self.recipe, self.model
        if self.state is not None:
            model.load_trained_state(self.state.weights(model.trained_state()))
        model.to(self.machine.device)
        splits, encoders = [self.data.train, self.data.validation], model.complementary_encoders()
        cached = cacheable(model, limit_mb=recipe.train.y_cache_mb, splits=splits) if recipe.train.cache_y else ()
        y = [{name: self.features.bare(encoders[name].backbone, name, split) for name in cached} for split in splits]
        if recipe.model.y_norm == "standardise" and self.state is None:
            self._fit_statistics(y[0])
        train, validation = (
            Batches(split, self.features.media, y=standardised(model, found))
            for split, found in zip(splits, y, strict=True)
        )
        return Loop(
            _objective(recipe, model),
            recipe=recipe,
            machine=self.machine,
            run=self.run,
            train=train,
            validation=validation,
            interruption=self.interruption,
            state=self.state,
        )

    def report(self) -> dict[str, Any]:
        """Evaluate the best model; see :func:`train.reporting.report`."""
        best = read_tensors(self.run.best / "model.safetensors", self.model.trained_state())
        self.model.load_trained_state(best)
        if self.recipe.run.standalone:
            self.model.save_pretrained(self.run.best, standalone=True)
        return report(
            self.run,
            self.recipe,
            self.model,
            self.features,
            self.data.reported,
            others=(self.data.train, self.data.validation),
        )

    def _fit_statistics(self, cached: dict[str, Any]) -> None:
        """Mean and deviation of y on the training rows, of cached features and of those that are not."""
        encoders, features, train = self.model.complementary_encoders(), self.features, self.data.train
        y = dict(cached)
        for spec in self.model.config.complementary:
            if spec.prompts:
                y[spec.modality] = features.prompted(self.model, spec.modality, train)
            elif spec.modality not in y:
                y[spec.modality] = features.bare(encoders[spec.modality].backbone, spec.modality, train)
        fit_statistics(self.model, train, y, seed=self.recipe.seed)

    def _finish(self, status: str, **values: Any) -> None:
        if self.machine.writes:
            self.run.finish(status, **values)

    def _announce(self) -> None:
        recipe, machine, trained, total = self.recipe, self.machine, *self.parameters.values()
        rows = ", ".join(f"{split.name} {len(split):,}" for split in self.data.splits)
        err.print(f"run    {self.run.folder}", markup=False)
        err.print(f"data   {rows} rows; {len(self.data.train.labels)} labels", markup=False)
        err.print(
            f"model  {trained:,} of {total:,} parameters train ({trained / total:.1%}); "
            f"{machine.device.type}, {machine.processes} process{'es' if machine.processes > 1 else ''}, "
            f"{machine.threads} thread{'s' if machine.threads > 1 else ''}",
            markup=False,
        )
        together = recipe.train.batch_size // recipe.train.accumulation
        if recipe.model.dynamic and recipe.train.importance_weight > 0 and together < recipe.model.experts:
            err.print(
                f"warning: {together} samples are routed at a time to {recipe.model.experts} experts: the importance "
                "loss is positive even for balanced routing; raise train.batch_size or lower train.accumulation",
                markup=False,
            )


@contextmanager
def _quiet(*, unless: bool) -> Iterator[None]:
    """Several processes would say everything several times."""
    before, err.quiet = err.quiet, err.quiet or not unless
    try:
        yield
    finally:
        err.quiet = before


def _build(recipe: Recipe, labels: tuple[str, ...]) -> MoPE:
    return build_model(recipe.model.model_copy(update={"labels": labels}), seed=recipe.seed)


def _objective(recipe: Recipe, model: MoPE) -> Objective:
    section = recipe.train
    return Objective(
        model, importance_weight=section.importance_weight, importance_threshold=section.importance_threshold
    )


def _check_room(recipe: Recipe, folder: Path, parameters: dict[str, int]) -> None:
    stored = parameters["total"] if recipe.run.standalone else 0
    check_room(folder, trained=parameters["trained"], total=stored)


def _advise(recipe: Recipe, steps: int) -> None:
    """Say what is allowed and surely not meant."""
    if recipe.optim.warmup_steps >= steps:
        err.print(
            f"warning: optim.warmup_steps={recipe.optim.warmup_steps} is no less than the {steps} steps of this run: "
            "the learning rates only rise",
            markup=False,
        )


def _parameters(model: MoPE) -> dict[str, int]:
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return {"trained": trained, "total": sum(parameter.numel() for parameter in model.parameters())}
