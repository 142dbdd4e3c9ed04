"""Rows that a run keeps for itself, so that export needs neither the hub nor to know how rows were held out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mope_deploy.data import FILES, open_samples
from mope_deploy.files import write_file
from train.data.split import Split

__all__ = ["keep_rows"]


def keep_rows(split: Split, folder: Path, *, with_files: bool) -> Path:
    """Write the rows of a split to ``folder/<split>.jsonl``.

    Args:
        split: the rows.
        folder: of the run.
        with_files: also keep their pictures and clips (hard links if that works); else rows name them where they are.

    Returns:
        The file.
    """
    modalities = [name for name, found in split.values.items() if found]
    # The split's own rows are known to be good; here only their files are looked up again.
    samples = open_samples(split.source, task=split.task, modalities=modalities, optional=modalities, skip_bad=True)
    lines = set(split.columns["line"].tolist())
    names: dict[Path, str] = {}
    rows = []
    for sample in samples:
        if sample.line not in lines:
            continue
        row: dict[str, Any] = {}
        for name in FILES:
            file = getattr(sample, name)
            if file is None:
                continue
            if file not in names:
                kept = f"{name}s/{split.name}/{len(names):07d}{file.suffix}"
                names[file] = kept if with_files else str(file.resolve())
                if with_files:
                    _link(file, folder / kept)
            row[name] = names[file]
        if sample.text is not None:
            row["text"] = sample.text
        rows.append(row | {"label": sample.label} | dict(sample.extra))
    path = folder / f"{split.name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
