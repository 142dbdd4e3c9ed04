"""JSONL rows → samples, checked.

A row is one JSON object per line: ``image``, ``audio``, ``video`` (paths, relative to the file's own folder), ``text``
and ``label`` (a name, or for multi-label tasks a list of names). Other keys are kept in :attr:`Sample.extra`. Training,
the export gate and the device all read through here: a row that one of them accepts, the others accept too. Every error
names file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mope_deploy.errors import DataError, UsageError
from mope_deploy.fields import did_you_mean, hidden, nearest, parse_json, shown
from mope_deploy.limits import MAX_LABEL_CHARS, MAX_LABELS, MAX_LINE_BYTES
from mope_deploy.preprocess import MODALITIES, Preprocessing, check_text
from mope_deploy.task import Label, SingleLabel, Task

__all__ = ["FILES", "MODALITIES", "Sample", "Samples", "count_rows", "fingerprint", "open_samples", "scan_labels"]

S = TypeVar("S")
T = TypeVar("T")
_HINTS = 20  # unknown labels of a file that are compared with all known ones
FILES = ("image", "audio", "video")  # modalities whose rows name a file


@dataclass(frozen=True)
class Sample:
    """One row.

    Args:
        image, audio, video: paths, if the row is read for them; known to exist and not to be empty.
        image_name, audio_name, video_name: the same as the row has them, relative to the file's folder.
        text: not blank, if the row is read for its text.
        label: a name, a tuple of names for multi-label tasks, or None where no label is asked for and none is given.
        line: 1-based line in ``source``.
        source: the JSONL file.
        extra: every other key of the row, as parsed.
    """

    image: Path | None
    text: str | None
    label: Label | None
    line: int
    source: Path
    image_name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    audio: Path | None = None
    audio_name: str | None = None
    video: Path | None = None
    video_name: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """What the row itself says, by modality: its text, and the names of its files."""
        found = {name: self.text if name == "text" else getattr(self, f"{name}_name") for name in MODALITIES}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def where(self) -> str:
        """``file:line``, as every error about this row begins."""
        return f"{self.source}:{self.line}"

    def load(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """The row as :meth:`Preprocessing.collate` takes it, with its files decoded.

        Returns:
            What ``preprocessing.load`` made of each modality, as far as the model reads it and the row has it; and
            ``notices``, a tuple of strings, where there is something to know about them.

        Raises:
            DataError: naming file and line: a file cannot be decoded or is outside the stated limits, or a modality is
                missing that may not be.
        """
        loaded: dict[str, Any] = {}
        notices: list[str] = []
        try:
            for name in preprocessing.modalities:
                value = getattr(self, name)
                if value is None and name in preprocessing.missing:
                    continue
                loaded[name] = preprocessing.load(name, value, on_notice=notices.append)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error
        return loaded | ({"notices": tuple(notices)} if notices else {})


@dataclass(kw_only=True, eq=False)
class Samples:
    """The rows of one file, read lazily each time it is iterated; see :func:`open_samples`.

    Attributes:
        skipped: the message of every row left out by ``skip_bad`` in the latest pass.
    """

    path: Path
    task: Task
    require_label: bool
    skip_bad: bool
    modalities: tuple[str, ...]
    optional: tuple[str, ...]
    skipped: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._known = frozenset(self.task.labels)
        self._hints: dict[str, str | None] = {}  # for the first unknown labels: each takes as long as a thousand rows

    def __iter__(self) -> Iterator[Sample]:
        self.skipped = []
        yield from self._usable(self._sample, _lines(self.path))

    def load(self, preprocessing: Preprocessing) -> Iterator[tuple[Sample, dict[str, Any]]]:
        """Every sample with what :meth:`Sample.load` makes of it; ``skip_bad`` covers undecodable files too."""
        return self._usable(lambda sample: (sample, sample.load(preprocessing)), self)

    def _usable(self, make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """What is made of each item, less what may be skipped."""
        for item in items:
            try:
                made = make(item)
            except DataError as error:
                if not self.skip_bad:
                    raise
                self.skipped.append(str(error))
            else:
                yield made

    def _sample(self, numbered: tuple[int, bytes]) -> Sample:
        number, line = numbered
        where = f"{self.path}:{number}"
        row = _row(line, where)
        found: dict[str, Any] = {}
        for name in self.modalities:
            if name in self.optional and row.get(name) is None:
                continue
            value = _value(row, name, where)
            if name == "text":
                try:
                    found["text"] = check_text(value)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from error
            else:
                found |= {name: _file(name, value, self.path.parent, where), f"{name}_name": value}
        label = self._label(row, where)
        extra = {key: value for key, value in row.items() if key not in (*MODALITIES, "label")}
        found = {"image": None, "text": None} | found
        return Sample(label=label, line=number, source=self.path, extra=extra, **found)

    def _label(self, row: dict[str, Any], where: str) -> Label | None:
        if row.get("label") is not None:
            return self.task.read(row["label"], where, self._name)
        if self.require_label:
            _value(row, "label", where)
            raise DataError(f"{where}: label", received="null", expected="a label")
        return None

    def _name(self, name: object, where: str) -> str:
        if not isinstance(name, str) or not name.strip():
            expected = "a label name (a string that is not blank)"
            raise DataError(f"{where}: label", received=shown(name), expected=expected)
        if len(name) > MAX_LABEL_CHARS:
            expected = f"at most {MAX_LABEL_CHARS} characters"
            raise DataError(f"{where}: label", received=shown(name), expected=expected)
        if character := hidden(name):
            what, expected = f"{where}: label {shown(name)}", "characters that can be shown"
            raise DataError(what, received=character, expected=expected)
        if self._known and name not in self._known:
            labels = self.task.labels
            few = f"one of {', '.join(map(repr, labels[:10]))}" + (" …" if len(labels) > 10 else "")
            if name not in self._hints and len(self._hints) < _HINTS:
                self._hints[name] = did_you_mean(name, labels)
            todo = self._hints.get(name)
            raise DataError(f"{where}: unknown label", received=shown(name), expected=few, todo=todo)
        return name


def open_samples(
    path: str | Path,
    *,
    task: Task = SingleLabel(),
    require_label: bool = True,
    skip_bad: bool = False,
    modalities: Collection[str] = ("image", "text"),
    optional: Collection[str] = (),
) -> Samples:
    """The rows of a JSONL file, read and checked lazily.

    Args:
        path: the file; pictures are found relative to its folder.
        task: what labels look like and which may occur; one without labels takes any name.
        require_label: a row without a label is an error.
        skip_bad: leave bad rows out instead of raising, and list them in :attr:`Samples.skipped`.
        modalities: which of ``image``, ``text``, ``audio`` and ``video`` a row must have; the others are not read.
        optional: those of them that a row may lack, or have as null.

    Raises:
        UsageError: the file does not exist or is no file.
        DataError: while iterating, naming file and line: truncated or malformed JSON, not UTF-8, not an object, a
            missing or mistyped key, a missing or empty file, empty text, an unknown label.
    """
    path = Path(path)
    _check_file(path)
    unknown = sorted(set(modalities) - set(MODALITIES))
    if unknown:
        raise UsageError("modalities", received=", ".join(unknown), expected=", ".join(MODALITIES))
    stray = sorted(set(optional) - set(modalities))
    if stray:
        raise UsageError("optional modalities", received=", ".join(stray), expected=f"some of {', '.join(modalities)}")
    return Samples(
        path=path,
        task=task,
        require_label=require_label,
        skip_bad=skip_bad,
        modalities=tuple(modalities),
        optional=tuple(optional),
    )


def scan_labels(path: str | Path, *, task: Task = SingleLabel(), skip_bad: bool = False) -> tuple[str, ...]:
    """Every label name of a file, in the order of first appearance.

    Raises:
        DataError: a row without a usable label, unless ``skip_bad``; more than 100,000 names.
    """
    found: dict[str, None] = {}
    for sample in open_samples(path, task=task, skip_bad=skip_bad, modalities=()):
        assert sample.label is not None
        found.update(dict.fromkeys((sample.label,) if isinstance(sample.label, str) else sample.label))
        if len(found) > MAX_LABELS:
            what = f"{sample.where}: more than {MAX_LABELS:,} different labels"
            raise DataError(what, todo="is label the right key?")
    return tuple(found)


def count_rows(path: str | Path) -> int:
    """Rows of a file without parsing them (blank lines do not count), for the total of a progress bar."""
    path = Path(path)
    _check_file(path)
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def fingerprint(path: str | Path) -> dict[str, Any]:
    """What identifies a data file and, cheaply, the files that it names.

    Returns:
        ``sha256`` of the file's bytes; ``rows``; ``images``, the number of different pictures it names; and
        ``images_sha256`` over the sorted lines ``path as written, tab, size in bytes`` (-1 if it is missing). The same
        as ``audios`` and ``videos`` if it names any. These files are not read: one replaced by another of exactly the
        same size goes unnoticed.
    """
    path = Path(path)
    _check_file(path)
    digest, rows = hashlib.sha256(), 0
    named: dict[str, set[str]] = {name: set() for name in FILES}
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            if not line.strip():
                continue
            rows += 1
            try:
                row = json.loads(line)
                for name in FILES:
                    if row.get(name) is not None:
                        named[name].add(str(row[name]))
            except (ValueError, AttributeError, RecursionError):
                continue  # a row that names no file; whoever reads the rows reports it
    found: dict[str, Any] = {"sha256": digest.hexdigest(), "rows": rows}
    for name, files in named.items():
        if files or name == "image":
            listing = "".join(f"{item}\t{_size(path.parent / item)}\n" for item in sorted(files))
            found[f"{name}s"] = len(files)
            found[f"{name}s_sha256"] = hashlib.sha256(listing.encode("utf-8", "surrogatepass")).hexdigest()
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = f"data file {path} {'is not a file' if path.exists() else 'does not exist'}"
        raise UsageError(what, expected="a JSONL file with one object per line: image, text, label")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of every line that is not blank; never more than the limit in memory."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                # The rest of such a file is not worth guessing at: raised here, this is fatal even with skip_bad.
                what = f"{path}:{number}: line longer than {MAX_LINE_BYTES // 2**20} MiB"
                raise DataError(what, expected="JSONL: one object per line")
            if line.strip():
                yield number, line


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8", received=f"byte 0x{line[error.start]:02x} at {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON, or cut short", received=f"{error.msg} (column {error.colno:,})") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON", received=str(error)) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: row", received=shown(row), expected="a JSON object with image, text and label")
    return row


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key in row:
        return row[key]
    hint = nearest(key, row)
    received, todo = ", ".join(map(shown, list(row)[:10])), f"is {hint!r} meant to be {key!r}?" if hint else None
    raise DataError(f"{where}: {key} missing", received=f"keys {received or 'none'}", todo=todo)


def _file(key: str, name: object, folder: Path, where: str) -> Path:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: {key}", received=shown(name), expected="a path")
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{where}: {key} {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {key} {shown(name)} cannot be read", received=type(error).__name__) from error
    if not path.is_file():
        raise DataError(f"{where}: {key} {path} is not a file")
    if size == 0:
        raise DataError(f"{where}: {key} {path} is empty (0 bytes)")
    return path
