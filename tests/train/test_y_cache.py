"""Features on disk: the bits that computing gives, found only for what they are features of, never trusted blindly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mope_deploy.model import MoPE
from mope_deploy.preprocess import Preprocessing
from tests.tiny import tiny_model
from tests.train.conftest import write_rows
from tests.train.test_data import split_of
from train.config import Recipe
from train.data import MediaCache, Split
from train.features import Features
from train.run import fit
from train.y_cache import YCache, batch_keys, cache_folder, encoder_key

CPU = torch.device("cpu")
# Of 3 to 11 tokens, one length only once, and more of another than a batch holds.
TEXTS = tuple("red blue card shows a seven two red blue"[: i % 37].strip() or "red" for i in range(1, 90))


@pytest.fixture(scope="module")
def model(tiny: Path) -> MoPE:
    return tiny_model(tiny / "vit", tiny / "bert", prompts=0).eval()


@pytest.fixture
def texts(tiny: Path, tmp_path: Path) -> Callable[..., Split]:
    """A split of these texts, in this order."""

    def make(texts: tuple[str, ...]) -> Split:
        image = str(next((tiny / "images").iterdir()))
        rows = [{"image": image, "text": text, "label": "neutral"} for text in texts]
        return split_of(write_rows(tmp_path / "train.jsonl", rows).parent)

    return make


def made(model: MoPE, cache: YCache | None, **options: object) -> Features:
    features = Features(model.preprocessing, MediaCache(model.preprocessing, limit_mb=1), CPU, batch_size=8)
    return replace(features, cache=cache, **options)


def text_features(model: MoPE, split: Split, cache: YCache | None, **options: object) -> dict[str, Tensor]:
    backbone = model.complementary_encoders()["text"].backbone
    found = made(model, cache, **options).bare(backbone, "text", split)
    return dict(zip(split.texts, found, strict=True))


def test_what_was_kept_is_what_computing_gives(
    model: MoPE, texts: Callable[..., Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and for the same batches only: those of the texts that are longer than a changed one."""
    cache = YCache(tmp_path / "y", limit_mb=1)
    plain = text_features(model, texts(TEXTS), None)
    first = text_features(model, texts(TEXTS), cache)
    encoded: list[str] = []
    encode = Preprocessing.encode_text
    monkeypatch.setattr(
        Preprocessing, "encode_text", lambda self, texts, **k: (encoded.extend(texts), encode(self, texts, **k))[1]
    )
    again = text_features(model, texts(TEXTS), cache)
    assert not encoded
    for text, y in plain.items():
        assert torch.equal(y, first[text])
        assert torch.equal(y, again[text])
        assert y.abs().max() > 0.1
    changed = tuple("two" if text == "red" else text for text in TEXTS)
    found = text_features(model, texts(changed), cache)
    assert sorted(encoded) == sorted(sorted(dict.fromkeys(changed), key=len)[:8]), "one batch of 8"
    alone = text_features(model, texts(changed), None)
    assert all(torch.equal(found[text], y) for text, y in alone.items())


def test_another_encoder_tokenizer_or_file_is_something_else(model: MoPE, tiny: Path, tmp_path: Path) -> None:
    backbone, plain = model.complementary_encoders()["text"].backbone, model.preprocessing
    keys = [encoder_key(backbone, plain, "text", device=CPU)]
    tokenizer = json.loads(plain.tokenizer or "")
    tokenizer["normalizer"] = {"type": "Lowercase"}
    keys.append(encoder_key(backbone, replace(plain, tokenizer=json.dumps(tokenizer)), "text", device=CPU))
    assert plain.text is not None
    shorter = replace(plain, text=replace(plain.text, max_length=plain.text.max_length - 1))
    keys.append(encoder_key(backbone, shorter, "text", device=CPU))
    moved = [shutil.copytree(tiny / name, tmp_path / name) for name in ("vit", "bert")]
    copies = tiny_model(*moved, prompts=0)
    other = copies.complementary_encoders()["text"].backbone
    assert encoder_key(other, plain, "text", device=CPU) == keys[0]
    assert len({encoder_key(mine.main, plain, "image", device=CPU) for mine in (model, copies)}) == 1
    norm = next(module for module in other.encoder.modules() if isinstance(module, torch.nn.LayerNorm))
    norm.eps *= 2  # the same weights, other values
    keys.append(encoder_key(other, plain, "text", device=CPU))
    norm.eps /= 2
    norm.weight.data[0] += 1e-6
    keys.append(encoder_key(other, plain, "text", device=CPU))
    assert len(set(keys)) == len(keys)

    image = next((tiny / "images").iterdir())
    copy = Path(shutil.copy(image, tmp_path / "moved.png"))
    assert batch_keys("image", [str(copy)]) == batch_keys("image", [str(image)])
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert batch_keys("image", [str(copy)]) != batch_keys("image", [str(image)])
    assert len({*batch_keys("text", ["a", "b"]), *batch_keys("text", ["b", "a"]), *batch_keys("text", ["a"])}) == 5


@pytest.mark.parametrize("damage", ["a bit", "cut short", "another encoder's"])
def test_damaged_files_are_computed_again(
    model: MoPE,
    texts: Callable[..., Split],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    cache, split = YCache(tmp_path / "y", limit_mb=1), texts(TEXTS[:20])
    before = text_features(model, split, cache)
    (shard,) = cache.folder.glob("*/*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "a bit":
        content[-3] ^= 1
    elif damage == "cut short":
        del content[-40:]
    else:
        backbone = model.complementary_encoders()["text"].backbone
        keys = load_file(shard)["keys"].numpy().tobytes()
        cache.write("other", [keys[i : i + 32] for i in range(0, len(keys), 32)], torch.ones(len(before), 16))
        assert shard.parent.name == encoder_key(backbone, model.preprocessing, "text", device=CPU)
        content = bytearray((cache.folder / "other" / shard.name).read_bytes())
    shard.write_bytes(content)
    capsys.readouterr()
    after = text_features(model, split, cache)
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert all(torch.equal(after[text], y) for text, y in before.items())
    monkeypatch.setattr(Features, "_encode", lambda *_, batches, **__: pytest.fail("it was not kept again"))
    text_features(model, split, cache)


def test_a_folder_that_cannot_be_written_costs_one_notice(
    model: MoPE, texts: Callable[..., Split], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    cache = YCache(tmp_path / "file" / "y", limit_mb=1)
    plain = text_features(model, texts(TEXTS[:20]), None)
    for _ in range(2):
        found = text_features(model, texts(TEXTS[:20]), cache)
    assert all(torch.equal(found[text], y) for text, y in plain.items())
    assert capsys.readouterr().err.count("features cannot be kept in") == 1


def test_what_was_not_used_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    cache = YCache(tmp_path, limit_mb=1)
    third = 90_000  # floats: a little more than a third of a MiB
    samples = {name: batch_keys("text", [name]) for name in "abcd"}
    for age, name in enumerate("abc"):
        cache.write("encoder", samples[name], torch.full((1, third * 8 // 9), float(age)))
    for age, path in enumerate(sorted(tmp_path.glob("*/*"), key=lambda path: load_file(path)["y"][0, 0].item())):
        os.utime(path, (1e9 + age, 1e9 + age))
    width = third * 8 // 9
    assert cache.read("encoder", samples["a"], width=width)[1].item(), "used now, so b is the oldest"
    cache.write("encoder", samples["d"], torch.zeros(1, width))
    kept = [name for name in "abcd" if cache.read("encoder", samples[name], width=width)[1].item()]
    assert kept == ["a", "c", "d"]


def test_processes_share_the_work(
    model: MoPE, texts: Callable[..., Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each computes its part and reads the other's; what cannot be shared is computed by both."""
    split, encode = texts(TEXTS), Features._encode
    expected = text_features(model, split, None)
    batches: list[int] = []

    def count(self: Features, encoder: object, modality: str, split: Split, chosen: list, **rest: object) -> None:
        batches.append(len(chosen))
        encode(self, encoder, modality, split, chosen, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Features, "_encode", count)
    for second_folder, computed in (("first", 1), ("elsewhere", 2)):
        batches.clear()
        first, second = (YCache(tmp_path / str(computed) / name, limit_mb=1) for name in ("first", second_folder))

        def other(second: YCache = second) -> None:
            text_features(model, split, second, process=1, processes=2)

        found = text_features(model, split, first, process=0, processes=2, wait=other)
        assert all(torch.equal(found[text], y) for text, y in expected.items())
        assert sum(batches) == computed * -(-len(expected) // 8)


def test_a_second_run_computes_nothing_that_the_first_has_kept(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, validation and baselines; weights are those of a run without the cache."""
    for name in ("confusion_picture", "usage_picture"):
        monkeypatch.setattr(f"train.run.{name}", lambda path, *_, **__: path.touch())
    for name in ("ROUNDS", "ROUND_STEPS", "SEEDS"):
        monkeypatch.setattr(f"train.baselines.{name}", 1)
    bare = ("model.complementary.0.prompts=0", "model.y_norm=standardise", "train.max_steps=2", "baselines=true")
    runs = []
    for number, choice in enumerate(("off", str(tmp_path / "y"), str(tmp_path / "y"))):
        runs.append(fit(recipe(*bare, f"train.y_cache={choice}", f"run.dir={tmp_path / str(number)}"), command="test"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache  ")]
    assert [line.endswith(" 0 computed") for line in lines[:8]] == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    assert [line.endswith(" 0 computed") for line in lines[8:]] == [True] * 8
    states = [load_file(outcome.run.last / "model.safetensors") for outcome in runs]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert runs[1].evaluation == runs[0].evaluation == runs[2].evaluation


def test_where_features_are_kept(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe("train.y_cache=off").train.y_cache == "off"
    assert cache_folder("off") is None
    assert cache_folder("/x/y") == Path("/x/y")
    monkeypatch.setenv("MOPE_CACHE", "/c")
    assert cache_folder("auto") == Path("/c/y")
    monkeypatch.delenv("MOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder("auto") == Path("/x/mope-deploy/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    assert cache_folder("auto") is None
