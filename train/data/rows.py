"""The rows a run trains on: every split read and checked, files decoded, and all of it recorded for the run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mope_deploy.console import err
from mope_deploy.data import FILES, fingerprint, scan_labels
from mope_deploy.errors import DataError
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track
from train.config import Recipe
from train.data.files import SplitFiles
from train.data.kept_rows import keep_rows
from train.data.labels import one_label_twice, without_rows
from train.data.media import MediaCache
from train.data.split import QUIET_ROWS, Split, drop_bad_files, hold_out, read_split
from train.run_folder import Run

__all__ = ["Rows", "decode", "decode_split", "describe", "read_rows", "refuse_other_data"]

MAX_LISTED = 100  # skipped rows that run.json names


@dataclass(frozen=True)
class Rows:
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


def read_rows(recipe: Recipe, files: SplitFiles) -> Rows:
    """Read and check every row of every file; hold out a validation split where there is none.

    Raises:
        DataError: naming file and line.
    """
    section, model = recipe.data, recipe.model
    task = model.make_task()
    if not task.labels:
        task = replace(task, labels=tuple(sorted(scan_labels(files.train, task=task, skip_bad=section.skip_bad))))
    if warning := one_label_twice(task.labels):
        err.print(f"warning: {warning}", markup=False)
    splits = {
        name: read_split(
            name,
            path,
            task=task,
            modalities=[spec.modality for spec in model.encoders],
            optional=model.missing,
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
    return Rows(files, train, validation, splits.get("test"))


def _with_tokens(recipe: Recipe, split: Split, preprocessing: Preprocessing) -> Split:
    """Without the rows whose texts have no tokens, which their tokenizer alone can say; each text is tokenised once.

    Raises:
        DataError: naming file and line of the first one that has none, unless the recipe skips such rows.
    """
    bad = {}
    texts = split.values["text"] if preprocessing.text is not None else ()
    for text in track(texts, what=f"tokenising {split.name}") if len(texts) > QUIET_ROWS else texts:
        try:
            preprocessing.check_text(text)
        except DataError as error:
            bad[text] = error
    return drop_bad_files(split, bad, skip_bad=recipe.data.skip_bad, modality="text")


def decode(recipe: Recipe, data: Rows, preprocessing: Preprocessing, *, threads: int) -> tuple[Rows, MediaCache]:
    """Tokenise every text and decode every picture, sound and video once: finds what cannot be used, fills the cache.

    Raises:
        DataError: naming file and line of the first one that cannot be used, unless the recipe skips such rows.
    """
    media = MediaCache(preprocessing, limit_mb=recipe.data.image_cache_mb)
    checked = {split.name: decode_split(recipe, split, media, threads=threads) for split in data.splits}
    if media.notices:
        err.print(
            f"note: {len(media.notices):,} files are used as they are, the first: {media.notices[0]}", markup=False
        )
    if warning := without_rows(checked["train"]):
        err.print(f"warning: {warning}", markup=False)
    return Rows(data.files, checked["train"], checked["validation"], checked.get("test")), media


def decode_split(recipe: Recipe, split: Split, media: MediaCache, *, threads: int) -> Split:
    """One split of :func:`decode`, without the rows that are skipped; raises as that does."""
    split = _with_tokens(recipe, split, media.preprocessing)
    for name in FILES if recipe.data.check_images else ():
        if split.values[name]:
            what = f"decoding {split.name}" if name == "image" else f"decoding {name} of {split.name}"
            bad = media.check(split.values[name], what=what, threads=threads, modality=name)
            split = drop_bad_files(split, bad, skip_bad=recipe.data.skip_bad, modality=name)
    if split.skipped:
        err.print(
            f"warning: {len(split.skipped):,} rows of {split.source} skipped, the first: {split.skipped[0]}",
            markup=False,
        )
    return split


def refuse_other_data(run: Run, data: Rows, *, only: Collection[str] | None = None) -> None:
    """Raises DataError if files or usable rows (``only`` of these splits) are not those the run started with."""
    recorded = run.read()["data"]
    before, counts = recorded.get("fingerprint"), recorded.get("rows")
    now = {name: fingerprint(path) for name, path in data.files.items()}
    names = sorted(now.keys() | (before.keys() if isinstance(before, dict) else set()))
    different = [
        name
        for name in names
        if (only is None or name in only) and (not isinstance(before, dict) or before.get(name) != now.get(name))
    ]
    for split in data.splits if isinstance(counts, dict) else ():
        if (only is None or split.name in only) and counts.get(split.name) != len(split):
            different.append(f"{split.name} (now {len(split):,} rows that can be used)")
    if different:
        raise DataError(
            f"the data of {run.folder} changed since it was started: {', '.join(different)}",
            todo="put the files back as they were, or start a new run; where only rows to evaluate on were mended: "
            f"python -m train --evaluate {run.folder}",
        )


def describe(run: Run, data: Rows, recipe: Recipe) -> dict[str, Any]:
    """``run.json``'s ``data``; writes the rows that the run must keep for itself."""
    paths = dict(data.files.items())
    if data.files.copied:
        paths |= {split.name: keep_rows(split, run.samples, with_files=True) for split in data.splits[1:]}
    elif data.files.validation is None:
        paths["validation"] = keep_rows(data.validation, run.samples, with_files=False)
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
