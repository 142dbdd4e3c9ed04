"""One training run from a checked recipe to a finished run folder."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from mope_deploy.console import err
from mope_deploy.data import fingerprint, scan_labels
from mope_deploy.errors import ConfigError, DataError
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from train.baselines import run_baselines
from train.callbacks import BestModel, Interruption, MetricsFile, ProgressLines, best_so_far
from train.config import Recipe
from train.data import Batches, ImageCache, Split, SplitFiles, drop_bad_images, find_splits, hold_out, read_split
from train.evaluation import decide, evaluate, predict, usage
from train.features import cacheable, complementary_features, fit_statistics
from train.objective import Objective
from train.report import confusion_picture, label_picture, usage_picture
from train.runs import Run, free_folder, resumable, write_json
from train.samples import keep_rows
from train.trainer import MopeTrainer, best_metric_name, read_weights, training_arguments

__all__ = ["Outcome", "Plan", "fit", "plan"]

MAX_LISTED = 100  # skipped rows that run.json names


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


@dataclass(frozen=True)
class _Machine:
    """Where training runs, and whether this process is the one that writes files."""

    state: PartialState
    device: torch.device
    processes: int
    writes: bool
    threads: int

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True)
class _Data:
    """The splits as trained on; ``test`` is None where there is none."""

    files: SplitFiles
    train: Split
    validation: Split
    test: Split | None

    @property
    def splits(self) -> list[Split]:
        return [self.train, self.validation, *([] if self.test is None else [self.test])]

    @property
    def reported(self) -> Split:
        return self.validation if self.test is None else self.test


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
    machine = _machine(recipe)
    interruption = Interruption(save_every=recipe.train.save_every)
    with interruption.installed():
        run = resume or Run(_agree(machine, free_folder(recipe) if machine.writes else None))
        state = resumable(run) if resume is not None else None
        data = _read(recipe, machine)
        model = _build(recipe, data)
        data, images = _decode(recipe, data, model, machine)
        if resume is not None:
            _same_data(resume, data)
        if machine.writes:
            run.create(recipe, command=command, data=_describe(run, data, recipe))
        try:
            return _run(recipe, machine, run, state, data, model, images, interruption)
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
    data = _divide(recipe, files)
    model = _build(recipe, data)
    per_epoch = -(-len(data.train) // recipe.train.batch_size)
    steps = recipe.train.max_steps or per_epoch * recipe.train.epochs
    return Plan({split.name: len(split) for split in data.splits}, data.train.labels, _parameters(model), steps)


def _machine(recipe: Recipe) -> _Machine:
    """Set up device, processes and threads as the recipe asks.

    Raises:
        ConfigError: the machine has not what the recipe needs.
    """
    section = recipe.train
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    problems = []
    if section.device == "cuda" and not gpu:
        problems.append("train.device: received cuda, but PyTorch finds no GPU here")
    cpu = section.device == "cpu" or not gpu
    if section.precision == "fp16" and cpu:
        problems.append("train.precision: received fp16, which needs a GPU; expected bf16 or fp32 on a CPU")
    parts = processes * section.accumulation
    if section.batch_size % parts:
        what = f"{processes} processes × {section.accumulation} accumulation steps"
        problems.append(f"train.batch_size: received {section.batch_size}, expected a multiple of {parts} ({what})")
    if problems:
        raise ConfigError("; ".join(problems))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    state = PartialState(cpu=cpu)
    return _Machine(state, state.device, processes, state.is_main_process, torch.get_num_threads())


def _agree(machine: _Machine, folder: Path | None) -> Path:
    """The main process's choice, in every process."""
    chosen = [folder]
    if machine.processes > 1:
        broadcast_object_list(chosen)
    assert chosen[0] is not None
    return chosen[0]


def _read(recipe: Recipe, machine: _Machine) -> _Data:
    """Find or make the files, one process first; read and check every row."""
    with machine.state.main_process_first():
        files = find_splits(recipe.data, multi_label=recipe.model.multi_label)
    assert files is not None
    return _divide(recipe, files)


def _divide(recipe: Recipe, files: SplitFiles) -> _Data:
    section, model = recipe.data, recipe.model
    labels = model.labels
    if labels is None:
        labels = tuple(sorted(scan_labels(files.train, multi_label=model.multi_label, skip_bad=section.skip_bad)))
    modalities = [model.main.modality, *(spec.modality for spec in model.complementary)]
    splits = {
        name: read_split(
            name,
            path,
            labels=labels,
            multi_label=model.multi_label,
            modalities=modalities,
            skip_bad=section.skip_bad,
            group_by=section.group_by,
        )
        for name, path in files.items()
    }
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        train, validation = hold_out(train, fraction=section.validation_fraction, seed=recipe.seed)
        err.print(
            f"note: no validation rows given: {len(validation):,} of {len(train) + len(validation):,} training rows "
            f"are held out (data.validation_fraction={section.validation_fraction}, seed {recipe.seed})",
            markup=False,
        )
    if files.test is None:
        err.print(
            "note: no test rows given: the final metrics are those of validation, which chose the model", markup=False
        )
    return _Data(files, train, validation, splits.get("test"))


def _build(recipe: Recipe, data: _Data) -> MoPE:
    return build_model(_config(recipe, data.train.labels), seed=recipe.seed)


def _config(recipe: Recipe, labels: tuple[str, ...]) -> MoPEConfig:
    values = recipe.model.model_dump() | {"labels": labels}
    values["main"] = EncoderSpec(**values["main"])
    values["complementary"] = tuple(EncoderSpec(**spec) for spec in values["complementary"])
    return MoPEConfig(**values)


def _decode(recipe: Recipe, data: _Data, model: MoPE, machine: _Machine) -> tuple[_Data, ImageCache | None]:
    """Decode every picture once, which fills the cache and finds those that cannot be used."""
    if model.preprocessing.image is None:
        return data, None
    images = ImageCache(model.preprocessing, limit_mb=recipe.data.image_cache_mb)
    if not recipe.data.check_images:
        return data, images
    checked = []
    for split in data.splits:
        bad = images.check(split.images, what=f"decoding {split.name}", threads=machine.threads)
        checked.append(drop_bad_images(split, bad, skip_bad=recipe.data.skip_bad))
    for split in checked:
        if split.skipped:
            err.print(
                f"warning: {len(split.skipped):,} rows of {split.source} skipped, the first: {split.skipped[0]}",
                markup=False,
            )
    return _Data(data.files, checked[0], checked[1], checked[2] if data.test is not None else None), images


def _same_data(run: Run, data: _Data) -> None:
    before = run.read()["data"].get("fingerprint")
    now = {name: fingerprint(path) for name, path in data.files.items()}
    if before != now:
        different = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
        raise DataError(
            f"the data of {run.folder} changed since it was started: {', '.join(different) or 'a split is gone'}",
            todo="put the files back as they were, or start a new run",
        )


def _describe(run: Run, data: _Data, recipe: Recipe) -> dict[str, Any]:
    """``run.json``'s ``data``; writes the rows that the run must keep for itself."""
    paths = dict(data.files.items())
    if data.files.copied:
        paths |= {split.name: keep_rows(split, run.samples, with_images=True) for split in data.splits[1:]}
    elif data.files.validation is None:
        paths["validation"] = keep_rows(data.validation, run.samples, with_images=False)
    return {
        **{name: run.path(paths[name]) if name in paths else None for name in ("train", "validation", "test")},
        "held_out": recipe.data.validation_fraction if data.files.validation is None else None,
        "rows": {split.name: len(split) for split in data.splits},
        "labels": list(data.train.labels),
        "fingerprint": {name: fingerprint(path) for name, path in data.files.items()},
        "skipped": {
            split.name: {"count": len(split.skipped), "rows": split.skipped[:MAX_LISTED]}
            for split in data.splits
            if split.skipped
        },
    }


def _run(
    recipe: Recipe,
    machine: _Machine,
    run: Run,
    state: Path | None,
    data: _Data,
    model: MoPE,
    images: ImageCache | None,
    interruption: Interruption,
) -> Outcome:
    """Everything after the checks."""
    started = time.monotonic()
    parameters = _parameters(model)
    _announce(recipe, machine, run, data, parameters)
    if state is not None:
        model.load_trained_state(read_weights(state))
    model.to(machine.device)
    train, validation = _batches(recipe, machine, data, model, images, fitted=state is not None)
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
    evaluation = _report(recipe, machine, run, data, model, images, parameters)
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
        machine=_machine_description(machine),
    )
    return Outcome(run, "finished", evaluation)


def _batches(
    recipe: Recipe, machine: _Machine, data: _Data, model: MoPE, images: ImageCache | None, *, fitted: bool
) -> tuple[Batches, Batches]:
    """Training and validation batches, with y computed once where nothing that trains can change it."""
    modalities = [recipe.model.main.modality, *(spec.modality for spec in recipe.model.complementary)]
    splits = [data.train, data.validation]
    size, device = recipe.train.eval_batch_size, machine.device
    cached = recipe.train.cache_y and cacheable(model, limit_mb=recipe.train.y_cache_mb, splits=splits)
    standardise = recipe.model.y_norm == "standardise"
    y: list[dict[str, torch.Tensor]] = [{}, {}]
    if standardise and not fitted:
        raw = complementary_features(model, data.train, images, batch_size=size, device=device)
        y[0] = fit_statistics(model, data.train, raw, seed=recipe.seed)
    elif cached:
        y[0] = complementary_features(model, data.train, images, batch_size=size, device=device)
    if cached:
        y[1] = complementary_features(model, data.validation, images, batch_size=size, device=device)
    else:
        y = [{}, {}]
    train, validation = (
        Batches(split, model.preprocessing, images, modalities=modalities, y=features)
        for split, features in zip(splits, y, strict=True)
    )
    return train, validation


def _trainer(
    recipe: Recipe,
    machine: _Machine,
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
    machine: _Machine,
    run: Run,
    data: _Data,
    model: MoPE,
    images: ImageCache | None,
    parameters: dict[str, int],
) -> dict[str, Any]:
    """Evaluate the best model on the whole path, nothing cached but pictures; write numbers and pictures."""
    split = data.reported
    modalities = [recipe.model.main.modality, *(spec.modality for spec in recipe.model.complementary)]
    batches = Batches(split, model.preprocessing, images, modalities=modalities)
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
            images,
            metric=best_metric_name(recipe),
            seed=recipe.seed,
            batch_size=recipe.train.eval_batch_size,
            device=machine.device,
        )
        write_json(run.folder / "baselines.json", {"split": split.name, "heads": evaluation["baselines"]})
    write_json(run.folder / "evaluation.json", evaluation)
    return evaluation


def _parameters(model: MoPE) -> dict[str, int]:
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return {"trained": trained, "total": sum(parameter.numel() for parameter in model.parameters())}


def _announce(recipe: Recipe, machine: _Machine, run: Run, data: _Data, parameters: dict[str, int]) -> None:
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


def _machine_description(machine: _Machine) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(machine.device) if not machine.cpu else platform.machine(),
        "processes": machine.processes,
        "threads": machine.threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mope-deploy", "torch", "timm", "transformers", "accelerate")},
    }
