"""Rows that a run keeps for itself, so that export needs neither the hub nor to know how rows were held out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mope_deploy.data import open_samples
from train.data import Split
from train.runs import write_text

__all__ = ["keep_rows"]


def keep_rows(split: Split, folder: Path, *, with_images: bool) -> Path:
    """Write the rows of a split to ``folder/<split>.jsonl``.

    Args:
        split: the rows.
        folder: of the run.
        with_images: also keep their pictures (as hard links where that works); else the rows name them where they are.

    Returns:
        The file.
    """
    modalities = [name for name, found in (("image", split.images), ("text", split.texts)) if found]
    samples = open_samples(split.source, multi_label=split.multi_label, modalities=modalities, skip_bad=True)
    lines = set(split.rows["line"])
    names: dict[Path, str] = {}
    rows = []
    for sample in samples:
        if sample.line not in lines:
            continue
        row: dict[str, Any] = {}
        if sample.image is not None:
            if sample.image not in names:
                kept = f"images/{split.name}/{len(names):07d}{sample.image.suffix}"
                names[sample.image] = kept if with_images else str(sample.image.resolve())
                if with_images:
                    _link(sample.image, folder / kept)
            row["image"] = names[sample.image]
        if sample.text is not None:
            row["text"] = sample.text
        rows.append(row | {"label": sample.label} | dict(sample.extra))
    path = folder / f"{split.name}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
