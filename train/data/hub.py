"""A hub data set written out as JSONL and picture files, once, so that everything after it reads the same rows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from mope_deploy.errors import DataError, UsageError
from mope_deploy.fields import nearest
from mope_deploy.files import json_bytes, reason, whole_folder
from mope_deploy.progress import track
from mope_deploy.reading import read_json
from mope_deploy.task import Task
from train.config import DataSection
from train.data.files import SplitFiles

__all__ = ["fetch_hub"]

INFO = "hub.json"
SPLITS = ("train", "validation", "test")  # ours, and what a data set calls them unless the recipe says otherwise


def fetch_hub(section: DataSection, root: Path, *, task: Task, fetch: bool = True) -> SplitFiles | None:
    """The splits of ``section.hub`` under ``root``, fetched unless they are there from before.

    Pictures keep the bytes they have in the data set; class numbers become their names. A row that cannot be used is
    written all the same: whoever reads the rows says which it is, or skips it.

    Arguments are those of :func:`train.data.sources.find_splits`.

    Raises:
        UsageError: no such data set, split or column, labels of another kind of task, or ``root`` holds something else.
    """
    request = {
        "hub": section.hub,
        "config": section.hub_config,
        "columns": section.columns.model_dump(),
        "splits": {name: getattr(section, name) for name in SPLITS},
        "task": task.type,
    }
    if root.exists() and any(root.iterdir()):
        return _found(root, request)
    if not fetch:
        return None
    loaded = _load(section)
    for rows in loaded.values():
        _check_labels(rows.features[section.columns.label], section, task)
    with whole_folder(root, error=DataError, sync=False) as folder:
        for name, rows in loaded.items():
            _write_split(rows, name, folder, section, task)
        (folder / INFO).write_bytes(json_bytes({"request": request, "splits": list(loaded)}))
    return _files(root, loaded)


def _found(root: Path, request: dict[str, Any]) -> SplitFiles:
    try:
        info = read_json(root / INFO)
        splits = [str(name) for name in info["splits"]]
        same = info["request"] == request and set(splits) <= set(SPLITS) and "train" in splits
    except (OSError, ValueError, KeyError, TypeError):
        same, splits = False, []
    if not same:
        raise UsageError(
            f"{root} exists and holds something else than {request['hub']} as this recipe asks for it",
            todo="choose another data.root, or remove the folder to fetch it again",
        )
    return _files(root, splits)


def _files(root: Path, splits: Iterable[str]) -> SplitFiles:
    paths = {name: root / f"{name}.jsonl" for name in splits}
    return SplitFiles(paths["train"], paths.get("validation"), paths.get("test"), copied=True)


def _load(section: DataSection) -> dict[str, Any]:
    """The Arrow table of every split that there is, and of every split that was asked for by name."""
    import datasets

    assert section.hub is not None
    try:
        available = datasets.load_dataset(section.hub, section.hub_config)
    except Exception as error:  # datasets and the hub raise anything from OSError to their own and to HTTP errors
        raise UsageError(
            f"the data set {section.hub} could not be loaded: {type(error).__name__}: {reason(error)}",
            todo="check data.hub and data.hub_config, or the network",
        ) from error
    found = {}
    for ours in SPLITS:
        theirs = getattr(section, ours) or ours
        if theirs in available:
            found[ours] = available[theirs]
        elif getattr(section, ours) is not None or ours == "train":
            raise UsageError(
                f"{section.hub} has no split {theirs!r}",
                expected=f"one of {', '.join(available)}",
                todo=f"set data.{ours}",
            )
    columns = next(iter(found.values())).column_names
    problems = []
    for key, name in section.columns.model_dump().items():
        if name not in columns:
            hint = nearest(name, columns)
            problems.append(f"data.columns.{key}={name}" + (f" (did you mean {hint}?)" if hint else ""))
    if problems:
        raise UsageError(
            f"{section.hub} has no such column: {', '.join(problems)}", expected=f"columns among {', '.join(columns)}"
        )
    return found


def _write_split(rows: Any, name: str, folder: Path, section: DataSection, task: Task) -> None:
    import datasets

    columns = section.columns
    if isinstance(rows.features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    to_name = _label_names(rows.features[columns.label], task)
    others = [key for key in rows.column_names if key not in columns.model_dump().values()]
    (folder / "images" / name).mkdir(parents=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(track(rows, what=f"writing {name}", total=len(rows))):
            image = _write_image(row[columns.image], folder / "images" / name / f"{number:07d}")
            line = {
                "image": image and f"images/{name}/{image}",
                "text": row[columns.text],
                "label": to_name(row[columns.label]),
            }
            extra = {key: row[key] for key in others if _is_plain(row[key])}
            file.write(json.dumps({**extra, **line}, ensure_ascii=False, default=str) + "\n")


def _is_plain(value: Any) -> bool:
    """Whether JSON has it: no NaN, which pandas writes for what is not there."""
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


def _write_image(value: Any, stem: Path) -> str | None:
    """Write one picture as it is in the data set; its file name, None where the row has none.

    A file that cannot be read is named, and not written.
    """
    content = None
    if isinstance(value, str):
        content = _read(Path(value))
    elif isinstance(value, dict):
        content = value.get("bytes") or (_read(Path(value["path"])) if value.get("path") else None)
    if content is None:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix = (image.format or "img").lower()
    except Exception:
        suffix = "img"
    path = stem.with_suffix(f".{suffix}")
    if content:
        path.write_bytes(content)
    return path.name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _check_labels(feature: Any, section: DataSection, task: Task) -> None:
    """A column of lists is for multi-label tasks, and for them alone: a string would be taken for a list of letters."""
    lists = isinstance(feature, list) or hasattr(feature, "feature")
    if lists != task.several:
        holds, other = ("lists", "multi-label") if lists else ("one value a row", "single-label")
        raise UsageError(
            f"data.columns.label={section.columns.label} of {section.hub} holds {holds}",
            received=f"model.task={task.type}",
            todo=f"choose another column, or model.task={other}",
        )


def _label_names(feature: Any, task: Task) -> Callable[[Any], Any]:
    """How a label column's values become names: numbers of a ClassLabel by its names, other numbers as written.

    Null, NaN and a ClassLabel's -1 are a label that is missing.
    """
    inner: Any = (feature[0] if isinstance(feature, list) else feature.feature) if task.several else feature
    classes = hasattr(inner, "int2str")

    def one(value: Any) -> Any:
        if value is None or value != value or (classes and value == -1):
            return None
        return inner.int2str(value) if classes else str(value)

    if not task.several:
        return one
    return lambda values: None if values is None else [one(value) for value in values]
