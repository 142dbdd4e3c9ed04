"""One training run from a checked recipe to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from mope_deploy.console import err
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from train.baselines import run_baselines
from train.callbacks import BestModel, Interruption, MetricsFile, ProgressLines, best_so_far
from train.config import Recipe
from train.data import Batches, MediaCache, find_splits
from train.data.rows import Prepared, decode, describe, read_rows, refuse_other_data
from train.evaluation import decide, evaluate, predict, usage
from train.features import Features, cacheable, fit_statistics, standardised
from train.machine import Machine, set_up
from train.objective import Objective
from train.report import confusion_picture, label_picture, usage_picture
from train.run_folder import Run, free_folder, resumable, write_json
from train.trainer import MopeTrainer, best_metric_name, read_weights, training_arguments
from train.y_cache import YCache, cache_folder

__all__ = ["Outcome", "Plan", "fit", "plan"]


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
    machine = set_up(recipe)
    interruption = Interruption(save_every=recipe.train.save_every)
    with interruption.installed(), _quiet(unless=machine.writes):
        run = resume or Run(machine.agree(free_folder(recipe) if machine.writes else None))
        state = resumable(run) if resume is not None else None
        with machine.state.main_process_first():
            files = find_splits(recipe.data, multi_label=recipe.model.multi_label)
        assert files is not None
        data = read_rows(recipe, files)
        model = build_model(_config(recipe, data.train.labels), seed=recipe.seed)
        data, media = decode(recipe, data, model.preprocessing, threads=machine.threads)
        if resume is not None:
            refuse_other_data(resume, data)
        if machine.writes:
            run.create(recipe, command=command, data=describe(run, data, recipe))
        try:
            return _run(recipe, machine, run, state, data, model, media, interruption)
        except KeyboardInterrupt:
            if machine.writes:
                run.finish("interrupted")
            return Outcome(run, "interrupted", {})
        except BaseException:
            if machine.writes:
                run.finish("failed")
            raise


def plan(recipe: Recipe) -> Plan:
    """Check everything that can be checked without writing anything: rows, labels, encoders, sizes.

    Raises:
        MopeError: whatever is wrong.
    """
    files = find_splits(recipe.data, multi_label=recipe.model.multi_label, fetch=False)
    if files is None:
        labels = recipe.model.labels or ("?", "??")
        model = build_model(_config(recipe, labels), seed=recipe.seed)
        return Plan(None, recipe.model.labels or (), _parameters(model), None)
    data = read_rows(recipe, files)
    model = build_model(_config(recipe, data.train.labels), seed=recipe.seed)
    per_epoch = -(-len(data.train) // recipe.train.batch_size)
    steps = recipe.train.max_steps or per_epoch * recipe.train.epochs
    return Plan({split.name: len(split) for split in data.splits}, data.train.labels, _parameters(model), steps)


def _config(recipe: Recipe, labels: tuple[str, ...]) -> MoPEConfig:
    values = recipe.model.model_dump() | {"labels": labels}
    values["main"] = EncoderSpec(**values["main"])
    values["complementary"] = tuple(EncoderSpec(**spec) for spec in values["complementary"])
    return MoPEConfig(**values)


@contextmanager
def _quiet(*, unless: bool) -> Iterator[None]:
    """Several processes would say everything several times."""
    before, err.quiet = err.quiet, err.quiet or not unless
    try:
        yield
    finally:
        err.quiet = before


def _run(
    recipe: Recipe,
    machine: Machine,
    run: Run,
    state: Path | None,
    data: Prepared,
    model: MoPE,
    media: MediaCache,
    interruption: Interruption,
) -> Outcome:
    """Everything after the checks."""
    started = time.monotonic()
    parameters = _parameters(model)
    _announce(recipe, machine, run, data, parameters)
    if state is not None:
        model.load_trained_state(read_weights(state))
    model.to(machine.device)
    features = _features(recipe, machine, model, media)
    train, validation = _batches(recipe, data, model, features, fitted=state is not None)
    trainer = _trainer(recipe, machine, run, model, train, validation, interruption)
    prepared = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressLines):
                callback.close()
    trained = time.monotonic()
    machine.state.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()  # what follows is the work of one process
    if interruption.received and trainer.state.global_step < trainer.state.max_steps:
        if machine.writes:
            run.finish("interrupted", step=trainer.state.global_step)
        return Outcome(run, "interrupted", {})
    if not machine.writes:
        return Outcome(run, "finished", {})
    model.load_trained_state(read_weights(run.best))
    if recipe.run.standalone:
        model.save_pretrained(run.best, standalone=True)
    evaluation = _report(recipe, machine, run, data, model, features.alone(), parameters)
    metric = best_metric_name(recipe)
    best = best_so_far(trainer.state.log_history, metric)
    assert best is not None
    scores = ("accuracy", "f1_macro", "f1_micro")
    run.finish(
        "finished",
        metrics={
            "validation": {metric: best[0], "epoch": best[1]},
            evaluation["split"]: {name: evaluation[name] for name in scores},
        },
        parameters=parameters,
        steps=trainer.state.global_step,
        seconds={
            "preparation": round(prepared - started, 1),
            "training": round(trained - prepared, 1),
            "evaluation": round(time.monotonic() - trained, 1),
        },
        machine=machine.describe(),
    )
    return Outcome(run, "finished", evaluation)


def _batches(
    recipe: Recipe, data: Prepared, model: MoPE, features: Features, *, fitted: bool
) -> tuple[Batches, Batches]:
    """Training and validation batches, with y computed once where nothing that trains can change it."""
    modalities = [recipe.model.main.modality, *(spec.modality for spec in recipe.model.complementary)]
    splits = [data.train, data.validation]
    encoders = model.complementary_encoders()
    cached = cacheable(model, limit_mb=recipe.train.y_cache_mb, splits=splits) if recipe.train.cache_y else ()
    raw = {name: features.bare(encoders[name].backbone, name, data.train) for name in cached}
    if recipe.model.y_norm == "standardise" and not fitted:
        others = {
            spec.modality: features.prompted(model, spec.modality, data.train)
            if spec.prompts
            else features.bare(encoders[spec.modality].backbone, spec.modality, data.train)
            for spec in model.config.complementary
            if spec.modality not in cached
        }
        fit_statistics(model, data.train, raw | others, seed=recipe.seed)
    of_validation = {name: features.bare(encoders[name].backbone, name, data.validation) for name in cached}
    train, validation = (
        Batches(split, model.preprocessing, features.media, modalities=modalities, y=standardised(model, y))
        for split, y in zip(splits, (raw, of_validation), strict=True)
    )
    return train, validation if not validation.encodes_text else _by_length(validation)


def _by_length(batches: Batches) -> Batches:
    """The same rows in another order, which metrics do not depend on: in a batch there is little padding."""
    split = batches.split.select(np.argsort(-batches.text_lengths(), kind="stable"))
    return Batches(
        split, batches.preprocessing, batches.media, modalities=[*batches.modalities, *batches.y], y=batches.y
    )


def _features(recipe: Recipe, machine: Machine, model: MoPE, media: MediaCache) -> Features:
    """Features of frozen encoders, found in the recipe's cache where they are there."""
    folder = cache_folder(recipe.train.y_cache)
    return Features(
        preprocessing=model.preprocessing,
        media=media,
        device=machine.device,
        batch_size=recipe.train.eval_batch_size,
        cache=None if folder is None else YCache(folder, limit_mb=recipe.train.y_cache_disk_mb),
        process=machine.state.process_index,
        processes=machine.processes,
        wait=machine.state.wait_for_everyone,
    )


def _trainer(
    recipe: Recipe,
    machine: Machine,
    run: Run,
    model: MoPE,
    train: Batches,
    validation: Batches,
    interruption: Interruption,
) -> MopeTrainer:
    section, metric = recipe.train, best_metric_name(recipe)
    callbacks: list[TrainerCallback] = [
        MetricsFile(run),
        BestModel(model, run, metric=metric, patience=section.early_stopping),
        ProgressLines(metric),
        interruption,
    ]
    if section.tensorboard and machine.writes:
        callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=str(run.tensorboard))))
    objective = Objective(
        model, importance_weight=section.importance_weight, importance_threshold=section.importance_threshold
    )
    return MopeTrainer(
        objective,
        recipe=recipe,
        args=training_arguments(recipe, run, processes=machine.processes, cpu=machine.cpu),
        train=train,
        validation=validation,
        callbacks=callbacks,
    )


def _report(
    recipe: Recipe,
    machine: Machine,
    run: Run,
    data: Prepared,
    model: MoPE,
    features: Features,
    parameters: dict[str, int],
) -> dict[str, Any]:
    """Evaluate the best model on the whole path, nothing cached but pictures; write numbers and pictures."""
    split = data.reported
    modalities = [recipe.model.main.modality, *(spec.modality for spec in recipe.model.complementary)]
    batches = Batches(split, model.preprocessing, features.media, modalities=modalities)
    found = predict(model, batches, batch_size=recipe.train.eval_batch_size, device=machine.device)
    evaluation = evaluate(split, found, group_by=recipe.data.group_by) | {"parameters": parameters}
    title = f"{recipe.name}: {split.name}, n = {len(split):,}"
    if split.multi_label:
        decided = decide(found.logits, multi_label=True)
        label_picture(run.folder / "confusion_matrix.png", split.targets(), decided, split.labels, title=title)
    else:
        accuracy = f"{title}, accuracy {evaluation['accuracy']:.1%}"
        confusion_picture(
            run.folder / "confusion_matrix.png", evaluation["confusion_matrix"], split.labels, title=accuracy
        )
    if found.routing is not None:
        used = usage(split, found.routing, grouped=recipe.data.group_by is not None)
        evaluation["routing"] = {
            "experts": int(found.routing.shape[-1]),
            "used_experts": used.used.tolist(),
            "mean_weight": {
                name: used.mean[row].round(4).tolist() for row, name in enumerate(used.names[: used.classes])
            },
        }
        usage_picture(
            run.folder / "expert_usage.png", used, title=f"Use of experts: {title}", grouped_by=recipe.data.group_by
        )
    if recipe.baselines:
        evaluation["baselines"] = run_baselines(
            model,
            (data.train, data.validation, split),
            features,
            metric=best_metric_name(recipe),
            seed=recipe.seed,
        )
        write_json(run.folder / "baselines.json", {"split": split.name, "heads": evaluation["baselines"]})
    write_json(run.folder / "evaluation.json", evaluation)
    return evaluation


def _parameters(model: MoPE) -> dict[str, int]:
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return {"trained": trained, "total": sum(parameter.numel() for parameter in model.parameters())}


def _announce(recipe: Recipe, machine: Machine, run: Run, data: Prepared, parameters: dict[str, int]) -> None:
    if not machine.writes:
        return
    rows = ", ".join(f"{split.name} {len(split):,}" for split in data.splits)
    share = parameters["trained"] / parameters["total"]
    err.print(f"run    {run.folder}", markup=False)
    err.print(f"data   {rows} rows; {len(data.train.labels)} labels", markup=False)
    err.print(
        f"model  {parameters['trained']:,} of {parameters['total']:,} parameters train ({share:.1%}); "
        f"{machine.device.type}, {machine.processes} process{'es' if machine.processes > 1 else ''}, "
        f"{machine.threads} thread{'s' if machine.threads > 1 else ''}",
        markup=False,
    )
    together = recipe.train.batch_size // recipe.train.accumulation
    if recipe.model.dynamic and recipe.train.importance_weight > 0 and together < recipe.model.experts:
        err.print(
            f"warning: {together} samples are routed at a time to {recipe.model.experts} experts: the importance loss "
            "is positive even for balanced routing; raise train.batch_size or lower train.accumulation",
            markup=False,
        )
