"""Where the rows come from: files, a hub data set written out as such files, or digits-ve. All end as JSONL."""

from __future__ import annotations

from pathlib import Path

from mope_deploy.errors import UsageError
from mope_deploy.task import Task
from train.config import DataSection
from train.data.files import SplitFiles

__all__ = ["find_splits"]


def find_splits(section: DataSection, *, task: Task, fetch: bool = True) -> SplitFiles | None:
    """The files that a recipe's ``data:`` names; generated or fetched where that is needed.

    Args:
        section: the recipe's ``data:``.
        task: what labels are like; their names do not matter here.
        fetch: False only looks: None is returned where something would have to be generated or fetched.

    Raises:
        UsageError: naming every file that does not exist, or a hub data set or split that cannot be read.
    """
    if section.name is not None:
        root = _root(section, section.name)
        if not fetch and not (root / "train.jsonl").is_file():
            return None
        from train.embedded.digits_ve import ensure_digits_ve

        ensure_digits_ve(root, seed=section.seed, train_pairs=section.train_pairs)
        return SplitFiles(root / "train.jsonl", root / "validation.jsonl", root / "test.jsonl")
    if section.hub is not None:
        from train.data.hub import fetch_hub

        root = _root(section, "hub-" + "".join(c if c.isalnum() else "-" for c in section.hub).strip("-"))
        return fetch_hub(section, root, task=task, fetch=fetch)
    return _files(section)


def _root(section: DataSection, name: str) -> Path:
    return Path(section.root or f"data/{name}").expanduser()


def _files(section: DataSection) -> SplitFiles:
    named = {"data.train": section.train, "data.validation": section.validation, "data.test": section.test}
    paths = {key: Path(name).expanduser() for key, name in named.items() if name is not None}
    absent = [f"{key}={path}" for key, path in paths.items() if not path.is_file()]
    if absent:
        raise UsageError(
            f"{', '.join(absent)}: no such file",
            expected="JSONL files with one object per line: image, text, label",
            todo=f"paths are relative to the current folder, {Path.cwd()}",
        )
    return SplitFiles(paths["data.train"], paths.get("data.validation"), paths.get("data.test"))
