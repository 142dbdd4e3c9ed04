"""What a trained run is worth: its best model on the split that is reported, as numbers and pictures in the folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from mope_deploy.errors import CheckpointError
from mope_deploy.files import json_bytes, write_file
from mope_deploy.metrics import confusions_csv
from mope_deploy.model import MoPE
from train.baselines import run_baselines
from train.config import Recipe
from train.data import Batches, MediaCache, Split, find_splits, read_split
from train.data.rows import Rows, decode_split, read_rows, refuse_other_data
from train.evaluation import evaluate, predict, usage
from train.features import Features
from train.loop import best_metric_name
from train.report import DECISIONS, usage_picture
from train.run_folder import Run

__all__ = ["again", "report"]


def report(
    run: Run,
    recipe: Recipe,
    model: MoPE,
    features: Features,
    split: Split,
    *,
    others: tuple[Split, Split] | None,
) -> dict[str, Any]:
    """Evaluate on the whole path, nothing cached but pictures; write numbers and pictures.

    Args:
        run: where.
        recipe: how.
        model: with the best weights.
        features: of its encoders.
        split: the rows.
        others: those of training and validation, for baselines.

    Returns:
        The content of ``evaluation.json``.
    """
    batches = Batches(split, features.media)
    found = predict(model, batches, batch_size=recipe.train.eval_batch_size, device=features.device)
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    total = sum(parameter.numel() for parameter in model.parameters())
    evaluation = evaluate(split, found, group_by=recipe.data.group_by)
    evaluation |= {"parameters": {"trained": trained, "total": total}}
    title = f"{recipe.name}: {split.name}, n = {len(split):,}"
    draw, decided = DECISIONS[type(split.task)], split.task.decide(found.logits)
    if "confusions" in evaluation:
        write_file(run.folder / "confusions.csv", confusions_csv(split.targets, decided, split.labels))
    if found.routing is not None:
        used = usage(split, found.routing, grouped=recipe.data.group_by is not None)
        samples = np.array([figures["support"] for figures in evaluation["per_class"].values()])
        evaluation["routing"] = used.summary(samples=samples)
    write_file(run.folder / "evaluation.json", json_bytes(evaluation))  # before pictures: they can be drawn again
    draw(run.folder / "confusion_matrix.png", split.targets, decided, split.labels, title=title)
    if found.routing is not None:
        title = f"Use of experts: {title}"
        usage_picture(run.folder / "expert_usage.png", used, title=title, grouped_by=recipe.data.group_by)
    if recipe.baselines and others is not None:
        metric = best_metric_name(recipe)
        heads = run_baselines(model, (*others, split), features, metric=metric, seed=recipe.seed)
        evaluation["baselines"] = heads
        write_file(run.folder / "baselines.json", json_bytes({"split": split.name, "heads": heads}))
        write_file(run.folder / "evaluation.json", json_bytes(evaluation))
    return evaluation


def again(run: Run, recipe: Recipe, media: MediaCache, *, threads: int) -> tuple[Split, tuple[Split, Split] | None]:
    """The rows to evaluate a trained run on once more, decoded; with baselines also those of training and validation.

    Raises:
        DataError: a row cannot be used, or rows that were trained on are others than they were.
    """
    data, model = run.trained_on(), recipe.model
    name = "test" if data.get("test") else "validation"
    if not isinstance(data.get(name), str):
        raise CheckpointError(f"{run.description} does not say where its {name} rows are")
    split = read_split(
        name,
        run.folder / data[name],
        task=model.make_task(),
        modalities=[spec.modality for spec in model.encoders],
        optional=model.missing,
        skip_bad=recipe.data.skip_bad,
        group_by=recipe.data.group_by,
    )
    others = None
    if recipe.baselines:
        files = find_splits(recipe.data, task=model.make_task())
        assert files is not None
        rows = read_rows(recipe, files)
        train, validation = (decode_split(recipe, one, media, threads=threads) for one in (rows.train, rows.validation))
        others = train, validation
        only = ("train", "validation") if name == "test" else ("train",)
        refuse_other_data(run, Rows(files, train, validation, rows.test), only=only)
    return decode_split(recipe, split, media, threads=threads), others
