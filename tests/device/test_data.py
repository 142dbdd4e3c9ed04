"""JSONL rows: what is read, and what every kind of damage is called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy import data
from mope_deploy.data import count_rows, fingerprint, open_samples, scan_labels
from mope_deploy.errors import DataError, UsageError
from mope_deploy.task import MultiLabel, SingleLabel
from tests.device import tiny

pytestmark = pytest.mark.device

GOOD = {"image": "a.png", "text": "the card", "label": "x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.picture(0, (9, 7)).save(tmp_path / "a.png")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "short.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_samples(folder: Path) -> None:
    path = write(
        folder, {**GOOD, "template": "t", "id": 7}, {"image": str(folder / "a.png"), "text": "é", "label": "y"}
    )
    first, second = open_samples(path, task=SingleLabel(("x", "y")))
    assert (first.image, first.image_name, first.text, first.label) == (folder / "a.png", "a.png", "the card", "x")
    assert (first.line, first.source, first.extra) == (1, path, {"template": "t", "id": 7})
    assert (second.image, second.label, second.line) == (folder / "a.png", "y", 2)


def test_lazy_and_repeatable(folder: Path) -> None:
    samples = open_samples(write(folder, GOOD, b"broken"))
    assert next(iter(samples)).line == 1
    assert next(iter(samples)).line == 1


def test_blank_lines_byte_order_mark_and_line_ends(folder: Path) -> None:
    row = json.dumps(GOOD).encode()
    path = write(folder, b"\xef\xbb\xbf" + row + b"\r", b"", b"   ", row, b"")
    assert [sample.line for sample in open_samples(path)] == [1, 4]
    assert count_rows(path) == 2


BAD = [
    (b'{"image": "a.png", "te', "not JSON, or cut short"),
    (b'\xff\xfe{"image"', "not UTF-8; received byte 0xff at 0"),
    (b"[1, 2]", "expected a JSON object"),
    (b'"a"', "expected a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": "a", "text": "b"}', "'text' occurs twice"),
    (b'{"n": NaN}', "NaN is not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "an integer of 5,000 digits"),
    ({**GOOD, "image": "b.png"}, "b.png does not exist"),
    ({**GOOD, "image": "zero.png"}, "zero.png is empty (0 bytes)"),
    ({**GOOD, "image": "."}, "is not a file"),
    ({**GOOD, "image": 7}, "image; received 7; expected a path"),
    ({**GOOD, "image": ""}, "expected a path"),
    ({**GOOD, "image": "a\0.png"}, "expected a path"),
    ({**GOOD, "image": "x" * 5000}, "cannot be read"),
    ({**GOOD, "text": "  "}, "text is empty"),
    ({**GOOD, "text": ["a"]}, "text; received list; expected a string"),
    ({**GOOD, "text": "a\0"}, "NUL"),
    (b'{"image": "a.png", "text": "\\ud800", "label": "x"}', "surrogate"),
    ({"image": "a.png", "txt": "a", "label": "x"}, "is 'txt' meant to be 'text'?"),
    ({"image": "a.png", "text": "a"}, "label missing"),
    ({**GOOD, "label": None}, "label; received null"),
    ({**GOOD, "label": "yes"}, "unknown label; received 'yes'; expected one of 'x', 'entailment'"),
    ({**GOOD, "label": "entailmnt"}, "did you mean 'entailment'?"),
    ({**GOOD, "label": 1}, "label; received 1"),
    ({**GOOD, "label": ["x"]}, "multi-label"),
    ({**GOOD, "label": ""}, "label"),
    ({**GOOD, "label": "x" * 257}, "(257 characters); expected at most 256 characters"),
    ({**GOOD, "label": "x\u001b[31m"}, "characters that can be shown"),
    (b'{"image": "a.png", "text": "a", "label": "\\ud83d"}', "surrogate"),
    (b'{"image": "a\\udcff.png", "text": "a", "label": "x"}', "surrogate"),
    (b'{"image": "a.png", "text": "a", "label": "x", "other": ["\\ud83d"]}', "surrogate"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[words for _, words in BAD])
def test_errors_name_file_and_line(folder: Path, row: Any, words: str) -> None:
    path = write(folder, GOOD, row, GOOD)
    with pytest.raises(DataError) as caught:
        list(open_samples(path, task=SingleLabel(("x", "entailment"))))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 6000 if "x" * 100 in message else len(message) < 500


def test_skip_bad_counts_and_lists(folder: Path) -> None:
    path = write(folder, *(row for row, _ in BAD), GOOD)
    samples = open_samples(path, task=SingleLabel(("x", "entailment")), skip_bad=True)
    assert [sample.line for sample in samples] == [len(BAD) + 1]
    assert len(samples.skipped) == len(BAD)
    assert f"{path}:1: " in samples.skipped[0]
    assert [sample.line for sample in samples] == [len(BAD) + 1]
    assert len(samples.skipped) == len(BAD)  # of the latest pass, not of both


def test_images_are_decoded_with_their_line(folder: Path) -> None:
    path = write(folder, GOOD, {**GOOD, "image": "short.png"}, GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: image .*short\.png cannot be decoded"):
        list(open_samples(path).load(tiny.preprocessing()))
    samples = open_samples(path, skip_bad=True)
    loaded = [(sample.line, row) for sample, row in samples.load(tiny.preprocessing())]
    assert [line for line, _ in loaded] == [1, 3]
    assert len(samples.skipped) == 1
    want = tiny.preprocessing().load_image(folder / "a.png")
    np.testing.assert_array_equal(loaded[0][1]["image"], want)
    assert loaded[0][1]["text"] == "the card"


def test_a_text_without_tokens_is_found_when_it_is_loaded(folder: Path) -> None:
    tokenizer = json.loads(tiny.tokenizer_json())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "🙂"}, "content": ""}
    preparing = type(tiny.preprocessing())(tiny.IMAGE, tiny.TEXT, json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: text has no tokens"):
        list(open_samples(write(folder, {**GOOD, "text": "🙂"})).load(preparing))


def test_multi_label(folder: Path) -> None:
    path = write(folder, {**GOOD, "label": ["x", "y"]}, {**GOOD, "label": []})
    assert [sample.label for sample in open_samples(path, task=MultiLabel(("x", "y")))] == [("x", "y"), ()]
    for label, words in (("x", r'write \["x"\]'), (["x", "x"], "twice"), (["z"], "unknown label"), ([1], "label name")):
        with pytest.raises(DataError, match=words):
            list(open_samples(write(folder, {**GOOD, "label": label}), task=MultiLabel(("x", "y"))))


def test_labels_are_optional_where_none_is_required(folder: Path) -> None:
    path = write(folder, {"image": "a.png", "text": "a"}, {**GOOD, "label": "anything"})
    assert [sample.label for sample in open_samples(path, require_label=False)] == [None, "anything"]


def test_only_the_asked_modalities_are_read(folder: Path) -> None:
    path = write(folder, {"image": "missing.png", "text": "a", "label": "x"})
    (sample,) = open_samples(path, modalities=["text"])
    assert (sample.image, sample.text) == (None, "a")
    with pytest.raises(UsageError, match="smell"):
        open_samples(path, modalities=["smell"])


def test_scan_labels(folder: Path) -> None:
    names = ["b", "a", "b", "c"]
    assert scan_labels(write(folder, *({"label": name} for name in names))) == ("b", "a", "c")
    path = write(folder, {"label": ["q", "p"]}, {"label": []}, {"label": ["p", "o"]})
    assert scan_labels(path, task=MultiLabel()) == ("q", "p", "o")
    with pytest.raises(DataError, match=":2: label missing"):
        scan_labels(write(folder, {"label": "a"}, {"image": "a.png"}))


def test_not_a_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.jsonl", "does not exist"), (tmp_path, "is not a file")):
        for read in (open_samples, scan_labels, count_rows, fingerprint):
            with pytest.raises(UsageError, match=words):
                read(path)


def test_a_line_without_end_is_not_read_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 100)
    path = write(folder, GOOD, {**GOOD, "text": "a" * 100}, GOOD)
    with pytest.raises(DataError, match=":2: line longer"):
        list(open_samples(path, skip_bad=True))


def test_labels_without_end_are_no_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_LABELS", 2)
    path = write(folder, *({**GOOD, "label": name} for name in "abc"))
    with pytest.raises(DataError, match=r":3: more than 2 different labels; is label the right key\?$"):
        scan_labels(path)


def test_fingerprint(folder: Path) -> None:
    path = write(folder, GOOD, {**GOOD, "image": "zero.png"}, b"broken", GOOD)
    found = fingerprint(path)
    size = (folder / "a.png").stat().st_size
    listing = f"a.png\t{size}\nzero.png\t0\n".encode()
    assert found == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 4,
        "images": 2,
        "images_sha256": hashlib.sha256(listing).hexdigest(),
    }
    (folder / "zero.png").write_bytes(b"1")
    assert fingerprint(path)["images_sha256"] != found["images_sha256"]
    (folder / "zero.png").unlink()
    assert fingerprint(path)["images_sha256"] != found["images_sha256"]
