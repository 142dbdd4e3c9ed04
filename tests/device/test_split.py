"""Split graphs: one session over several files, and the rows that are kept instead of being made again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy.bench.measure import measure
from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.cache import CacheUse, RowCache
from mope_deploy.engines.split import SplitSession, content_keys
from mope_deploy.errors import UsageError
from mope_deploy.predictor import load
from tests.device import tiny
from tests.device.conftest import write_split_bundle
from tests.device.sensors import bare_board
from tests.device.test_cli import mope  # noqa: F401  (a fixture)
from tests.device.test_engines import feeds

pytestmark = pytest.mark.device

SHAPES = {"input_ids": ("batch", "text_length"), "attention_mask": ("batch", "text_length"), "text_present": ("batch",)}


def open_split(path: Path, *, cache_mb: int = 1) -> SplitSession:
    found = open_session(Bundle.open(path), threads=1, cache_mb=cache_mb)
    assert isinstance(found, SplitSession)
    return found


def rows_run(session: SplitSession, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the text's part is run on, from now on."""
    seen: list[dict[str, Any]] = []
    part, run = session.parts["text"], session.parts["text"].run
    monkeypatch.setattr(part, "run", lambda given, outputs=None: (seen.append(dict(given)), run(given, outputs))[1])
    return seen


def some(inputs: dict[str, np.ndarray], *rows: int) -> dict[str, np.ndarray]:
    return {name: array[list(rows)] for name, array in inputs.items()}


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_equals_the_graph_in_one_file(bundle_path: Path, split_path: Path, cache_mb: int) -> None:
    one, split = open_session(Bundle.open(bundle_path), threads=1), open_split(split_path, cache_mb=cache_mb)
    assert (split.inputs, split.outputs) == (one.inputs, one.outputs)
    for batch, length in [(1, 1), (7, 9), (13, 4)]:
        inputs = feeds(batch, length, seed=batch)
        want = one.run(inputs)
        for name, array in split.run(inputs).items():
            assert array.tobytes() == want[name].tobytes()
            np.testing.assert_allclose(array, tiny.oracle(inputs)[name], rtol=0, atol=1e-5)
    assert list(split.run(inputs, ["routing"])) == ["routing"]
    with pytest.raises(UsageError, match="received none; expected pixel_values, input_ids, attention_mask"):
        split.run({})
    with pytest.raises(UsageError, match="'y_text'; expected one of logits, routing"):
        split.run(inputs, ["y_text"])


def test_only_new_inputs_are_run(split_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_split(split_path)
    seen = rows_run(session, monkeypatch)
    inputs = feeds(4, 9, seed=3)
    inputs["attention_mask"] = (np.arange(9) < np.array([[3], [9], [5], [2]])).astype(np.int64)
    first = session.run(some(inputs, 1))
    batch = some(inputs, 1, 0, 2, 0, 3)
    found = session.run(batch)
    # Row 1 was seen, row 0 comes twice; of the rest the longest has 5 tokens.
    assert [given["input_ids"].tolist() for given in seen[1:]] == [inputs["input_ids"][[0, 2, 3], :5].tolist()]
    np.testing.assert_allclose(found["logits"], tiny.oracle(batch)["logits"], rtol=0, atol=1e-5)
    assert session.run(batch)["logits"].tobytes() == found["logits"].tobytes()
    assert session.run(some(inputs, 1))["logits"].tobytes() == first["logits"].tobytes()
    assert len(seen) == 2
    assert session.cache is not None
    use = session.cache.use
    assert (use.hits, use.misses, use.entries) == (1 + 1 + 5 + 1, 1 + 3, 4)
    other_pixels = {**some(inputs, 1), "pixel_values": inputs["pixel_values"][:1]}
    np.testing.assert_allclose(
        session.run(other_pixels)["logits"], tiny.oracle(other_pixels)["logits"], rtol=0, atol=1e-5
    )
    other_words = {**some(inputs, 1), "input_ids": (inputs["input_ids"][1:2] + 1) % len(tiny.VOCABULARY)}
    np.testing.assert_allclose(
        session.run(other_words)["logits"], tiny.oracle(other_words)["logits"], rtol=0, atol=1e-5
    )
    assert len(seen) == 3


def test_keys_are_of_a_sample_s_own_tokens() -> None:
    inputs = {name: array for name, array in feeds(3, 6, seed=1).items() if name != "pixel_values"}
    inputs["attention_mask"] = (np.arange(6) < np.array([[4], [6], [1]])).astype(np.int64)
    keys = content_keys("text", inputs, SHAPES)
    assert len(set(keys)) == 3
    padded = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in inputs.items()}
    padded["input_ids"][:, 6:] = 7  # whatever stands in the padding
    assert content_keys("text", padded, SHAPES) == keys
    assert content_keys("text", {n: np.asfortranarray(a) for n, a in some(inputs, 2, 0).items()}, SHAPES) == [
        keys[2],
        keys[0],
    ]
    assert not set(keys) & set(content_keys("audio", inputs, SHAPES))
    longer = {**inputs, "attention_mask": np.ones((3, 6), np.int64)}
    assert [a == b for a, b in zip(content_keys("text", longer, SHAPES), keys, strict=True)] == [False, True, False]
    wider = {name: array.astype(np.int32) for name, array in inputs.items()}
    assert not set(keys) & set(content_keys("text", wider, SHAPES))


def test_samples_without_the_modality_share_a_row(graph_file: Path, tmp_path: Path) -> None:
    path = write_split_bundle(tmp_path / "b", graph_file, missing=True)
    predictor = load(path, threads=1)
    predictor.verify()
    measured = measure(path, threads=1, text_length=5, seconds=0.01, board=bare_board())
    assert measured["settings"]["text_length"] == 5
    pictures = [tiny.picture(i, (9, 9)) for i in range(4)]
    texts = ["red", None, "seven left of four", None]
    found = predictor.predict(image=pictures, text=texts)
    assert isinstance(found, list)
    assert predictor.cache is not None
    before = predictor.cache.misses
    arrays = tiny.preprocessing(missing=True).collate(
        [{"image": picture, "text": text} for picture, text in zip(pictures, texts, strict=True)]
    )
    logits = tiny.oracle(arrays)["logits"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    want = powers / powers.sum(axis=1, keepdims=True)
    for one, row in zip(found, want, strict=True):
        assert list(one.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
    changed = {**arrays, "input_ids": np.where(arrays["text_present"][:, None], arrays["input_ids"], 5)}
    np.testing.assert_allclose(predictor.session.run(changed)["logits"], logits, rtol=0, atol=1e-5)
    assert predictor.cache.misses == before


def test_a_sample_alone_is_the_same_in_every_batch(graph_file: Path, tmp_path: Path) -> None:
    """Where ranges are those of whole tensors, each sample runs alone, so the cache changes no bit."""
    gate = {"samples": 5, "mark": "", "kept": [], "thresholds": {"labels": 0.9}, "figures": {"labels": 1.0}}
    path = write_split_bundle(tmp_path / "b", graph_file, precision="int8-dynamic", gate=gate)
    cached, plain = open_split(path), open_split(path, cache_mb=0)
    inputs = feeds(6, 8, seed=9)
    for rows in [(0, 1, 2), (2, 5, 0, 3), (4,), (5, 4, 3, 2, 1, 0)]:
        batch = some(inputs, *rows)
        assert cached.run(batch)["logits"].tobytes() == plain.run(batch)["logits"].tobytes()
    assert cached.cache is not None
    assert cached.cache.use.misses == 6
    assert plain.cache is None


# --- the store itself ---


def numbers(keys: list[bytes]) -> Callable[[list[int]], np.ndarray]:
    """A row of 64 float32 for each key: its value, 64 times."""
    return lambda positions: np.array([[float(keys[i])] * 64 for i in positions], np.float32)


def ask(cache: RowCache, *keys: bytes) -> np.ndarray:
    found = cache.rows(keys, numbers(list(keys)))
    assert found[:, 0].tolist() == [float(key) for key in keys]
    return found


def test_the_least_recently_used_goes_first() -> None:
    cache = RowCache(limit=3 * (64 * 4 + 256))
    ask(cache, b"1", b"2", b"3")
    ask(cache, b"1")
    ask(cache, b"4")  # 2 was not asked for since
    assert cache.use == CacheUse(hits=1, misses=4, entries=3, bytes=3 * 512, limit=3 * 512)
    ask(cache, b"1", b"3", b"4")
    assert cache.use.misses == 4
    ask(cache, b"2")
    assert cache.use.misses == 5
    ask(cache, *(str(i).encode() for i in range(10, 20)))  # more than it holds, all at once
    assert (cache.use.entries, cache.use.bytes) == (3, 3 * 512)
    small = RowCache(limit=511)
    ask(small, b"1", b"1")
    assert small.use == CacheUse(hits=1, misses=1, entries=0, bytes=0, limit=511)


def test_what_is_given_out_may_be_written_to() -> None:
    cache = RowCache(limit=10_000)
    ask(cache, b"1")[:] = 7
    ask(cache, b"1")[:] = 8
    ask(cache, b"1")


def test_threads_share_it_and_do_not_wait_for_each_other() -> None:
    cache, together = RowCache(limit=10_000), threading.Barrier(2, timeout=20)

    def slow(key: bytes) -> np.ndarray:
        def compute(positions: list[int]) -> np.ndarray:
            together.wait()  # both are in here at once, or neither gets out
            return numbers([key])(positions)

        return cache.rows([key], compute)

    with ThreadPoolExecutor(2) as pool:
        for keys in ((b"1", b"2"), (b"3", b"3")):
            assert [row[0, 0] for row in pool.map(slow, keys)] == [float(key) for key in keys]
    assert cache.use == CacheUse(hits=0, misses=4, entries=3, bytes=3 * 512, limit=10_000)


def test_threads_on_one_session(split_path: Path) -> None:
    session = open_split(split_path)
    session.cache = RowCache(limit=4 * (2 * tiny.WIDTH * 4 + 256))
    inputs = feeds(10, 7, seed=5)
    want = tiny.oracle(inputs)["logits"]

    def work(seed: int) -> int:
        draw = np.random.default_rng(seed)
        for _ in range(30):
            rows = draw.integers(0, 10, draw.integers(1, 6)).tolist()
            np.testing.assert_allclose(session.run(some(inputs, *rows))["logits"], want[rows], rtol=0, atol=1e-5)
            done.append(len(rows))
        return seed

    done: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]
    use = session.cache.use
    assert use.hits + use.misses == sum(done)
    assert use.entries == 4
    assert use.bytes <= use.limit


# --- commands ---


def test_every_command(mope, split_path: Path, data_file: Path, tmp_path: Path) -> None:  # noqa: F811
    done = mope("verify", split_path)
    assert done.code == 0
    assert "model in onnxruntime" in done.out
    assert "a split graph runs in ONNX Runtime alone" in mope("run", split_path, "--data", data_file).err
    rows = [json.loads(row) for row in data_file.read_text().splitlines()]
    (one := data_file.with_name("one.jsonl")).write_text("\n".join(json.dumps({**row, "text": "red"}) for row in rows))
    done = mope("run", split_path, "--data", one, "--batch-size", "2", "--threads", "1")
    assert "complementary inputs: 1 encoded, 5 not encoded again" in done.err
    off = mope("run", split_path, "--data", one, "--batch-size", "2", "--threads", "1", "--cache-mb", "0")
    assert [json.loads(row)["label"] for row in off.out.splitlines()] == [
        json.loads(row)["label"] for row in done.out.splitlines()
    ]
    assert "encoded" not in off.err
    done = mope("eval", split_path, one, "--json", "--no-arena", "--threads", "1")
    found = json.loads(done.out)
    assert (found["cache"]["hits"], found["cache"]["misses"]) == (5, 1)
    assert found["engine"]["settings"] == {
        "threads": 1,
        "threads_from": "asked for",
        "arena": False,
        "spinning": True,
    }
    shown = " ".join(mope("info", split_path).out.split())
    assert f"of it text: model.text.onnx, 0.0 MB; {2 * tiny.WIDTH} numbers for each input" in shown
    assert "arena on (threads: the cores of this process)" in shown


def test_bench_measures_the_main_file_apart(
    mope,  # noqa: F811
    split_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mope_deploy.bench import measure as measuring

    monkeypatch.setattr(measuring, "Board", bare_board)
    opened: list[SplitSession] = []
    monkeypatch.setattr(
        measuring, "open_session", lambda *a, **how: (opened.append(open_session(*a, **how)), opened[-1])[1]
    )
    file = tmp_path / "figures.json"
    code, out, _ = mope("bench", split_path, "--duration", "0.1", "--json", file, "--plot", tmp_path / "a.svg")
    assert code == 0
    assert opened[0].cache is None
    (row,) = json.loads(file.read_text())["variants"]
    assert row["y_cached"]["ratio_to_first"]["value"] == row["y_cached"]["p50_ms"] / row["engine"]["p50_ms"]
    assert row["bytes"] == sum((split_path / name).stat().st_size for name in ("model.onnx", "model.text.onnx"))
    (line,) = [line for line in out.splitlines() if "engine, y cached" in line]
    assert f"{row['y_cached']['p50_ms']:.3f}" in line
    assert "engine, y cached" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("verify", "{b}", "--engine", "tensorrt"), 2, "export again without --split"),
        (("build", "{b}"), 2, "a split graph runs in ONNX Runtime alone: export again without --split"),
        (("run", "{b}", "--image", "a", "--text", "b", "--cache-mb", "-1"), 2, "--cache-mb"),
        (("run", "{b}", "--image", "a", "--text", "b", "--no-arena", "--rebuild"), 2, "arena belongs to onnxruntime"),
    ],
)
def test_misuse(mope, split_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:  # noqa: F811
    done = mope(*(argument.format(b=split_path) for argument in arguments))
    assert done.code == code
    assert words in done.err
    with pytest.raises(UsageError, match="cache_mb; received -1; expected an integer from 0 to"):
        load(split_path, cache_mb=-1)


def test_a_graph_in_one_file_keeps_nothing(bundle_path: Path) -> None:
    assert load(bundle_path, cache_mb=64).cache is None
