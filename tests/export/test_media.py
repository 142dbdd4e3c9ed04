"""Sound and video through the whole export: one bundle of text, audio and video, two of which may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import soundfile

from export.gate.reference import eager_outputs
from export.pipeline import export_bundle
from export.recheck import check_bundle
from mope_deploy import load
from mope_deploy.bundle import Bundle
from mope_deploy.cli import app
from mope_deploy.console import run_app
from mope_deploy.data import open_samples
from mope_deploy.engines.tensorrt.profiles import Sizes, make_profile
from mope_deploy.errors import BundleError, DataError, MediaError, UsageError
from mope_deploy.manifest import read_manifest
from mope_deploy.model import MoPE
from mope_deploy.preprocess import Waveform
from tests.export.runtime import run_named
from tests.media import Encoders, media_model, tone, write_video
from tests.tiny import LABELS, WORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoPE:
    encoders = Encoders(tmp_path_factory.mktemp("media-encoders"))
    return media_model(encoders, "text", "wav2vec2", "videomae-fine-tuned", missing=("audio", "video"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a text and, in part, synthetic tones at two rates and short clips."""
    folder, random = tmp_path_factory.mktemp("media-data"), np.random.default_rng(0)
    for i in range(7):
        rate = (4410, 8000)[i % 2]
        stereo = np.stack([tone(200 + 40 * i, 0.15 + 0.06 * i, rate=rate), tone(90, 0.15 + 0.06 * i, rate=rate)], 1)
        soundfile.write(folder / f"{i}.wav", stereo, rate)
        write_video(folder / f"{i}.mkv", random.integers(0, 256, (3 + i, 20, 24, 3), dtype=np.uint8))
    rows = []
    for i in range(44):
        row = {"text": " ".join(random.choice(WORDS[5:], 1 + i % 6)), "label": LABELS[i % 3]}
        row |= {"audio": f"{i % 7}.wav"} if i % 3 else {}
        row |= {"video": f"{i % 7}.mkv"} if i % 4 else {"video": None}
        rows.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def bundle(model: MoPE, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(model, tmp_path_factory.mktemp("media-bundle") / "bundle", data=data)


def test_predictions_are_the_models_with_and_without_each_modality(bundle: Path, model: MoPE, data: Path) -> None:
    predictor = load(bundle)
    folder = data.parent
    given = {"text": "the red card", "audio": folder / "3.wav", "video": folder / "4.mkv"}
    seen = []
    for absent in ((), ("audio",), ("video",), ("audio", "video")):
        inputs = {name: value for name, value in given.items() if name not in absent}
        found = predictor.predict(**inputs)
        loaded = {name: model.preprocessing.load(name, value) for name, value in inputs.items()}
        logits = eager_outputs(model, model.preprocessing.collate([loaded]))["logits"][0].astype(np.float64)
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(list(found.probabilities.values()), expected / expected.sum(), atol=1e-5)
        seen.append(tuple(np.round(list(found.probabilities.values()), 4)))
    assert len(set(seen)) == 4, "each of them matters"
    several = predictor.predict(text="the red card", audio=[given["audio"], None], video=given["video"])
    assert [tuple(np.round(list(one.probabilities.values()), 4)) for one in several] == [seen[0], seen[1]]
    with pytest.raises(UsageError, match="text is missing"):
        predictor.predict(audio=given["audio"])
    with pytest.raises(UsageError, match="reads no image"):
        predictor.predict(text="a", image=folder / "0.png")
    with pytest.raises(MediaError, match=r"audio\[1\]: audio .*absent.wav does not exist"):
        predictor.predict(text="a", audio=[given["audio"], folder / "absent.wav"])


def test_golden_samples_are_stored_without_loss_and_repeated_bit_for_bit(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    names = {Path(name).suffix for name in opened.manifest.files if name.startswith("golden/")}
    assert names == {".jsonl", ".npz", ".flac"}
    inputs, _ = opened.golden()
    assert set(inputs) == set(opened.manifest.tensors) >= {"audio_present", "video_present", "audio_mask"}
    assert 0 < inputs["audio_present"].sum() < len(inputs["audio_present"])
    result = load(bundle).verify()
    assert result.samples == 8
    assert result.logits_error < 1e-4


def test_what_the_bundle_says_of_itself(bundle: Path, model: MoPE, data: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert (manifest.main, manifest.complementary, manifest.missing) == ("text", ("audio", "video"), ("audio", "video"))
    assert Bundle.open(bundle).preprocessing == model.preprocessing
    graph = manifest.graphs[0]
    assert {spec.name: (spec.dtype, spec.shape) for spec in graph.inputs} == manifest.tensors
    assert make_profile(manifest, graph.inputs)["audio_length"] == Sizes(30, 400, 400)
    for sizes in ("1:30:40", "30:40:401"):
        with pytest.raises(UsageError, match="--audio-len"):
            make_profile(manifest, graph.inputs, audio_length=sizes)
    assert all(report.passed for report in check_bundle(model, Bundle.open(bundle), data=data).values())


def test_a_part_for_each_modality_that_may_be_missing(
    bundle: Path, model: MoPE, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y of a missing one is its stand-in, and what each hands over depends on it alone."""
    monkeypatch.setattr("export.variants.trace", lambda *_, **__: ir.load(bundle / "model.onnx"))
    path = export_bundle(model, tmp_path / "parts", data=data, split=True)
    (graph,) = Bundle.open(path).manifest.graphs
    assert [part.modality for part in graph.parts] == ["audio", "video"]
    assert [spec.name for spec in graph.inputs] == [
        "input_ids",
        "attention_mask",
        "conditions_audio",
        "conditions_video",
    ]
    inputs, _ = Bundle.open(path).golden()
    for part in graph.parts:
        y, _ = run_named(path / part.file, inputs).values()
        missing = inputs[f"{part.modality}_present"] == 0
        stand_in = model.stand_ins[part.modality].detach().numpy()
        np.testing.assert_array_equal(y[missing], np.tile(stand_in, (missing.sum(), 1)))
        assert np.abs(y[~missing] - stand_in).max() > 1e-3
    assert load(path).verify().samples == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["preprocess"].update(missing=["text"]), "missing"),
        (lambda d: d["preprocess"].update(missing=["smell"]), "missing"),
        (lambda d: d["preprocess"].update(audio=None), "modalities"),
        (lambda d: d["preprocess"]["audio"].update(max_samples=0), "max_samples"),
        (lambda d: d["preprocess"]["audio"].update(fixed=True), "audio_values"),
        (lambda d: d["preprocess"]["video"].update(frames=5), "video_values"),
        (lambda d: d["preprocess"].update(missing=["audio"]), "video_present"),
    ],
)
def test_a_manifest_at_odds_with_itself_is_refused(bundle: Path, change: Callable, message: str) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    read_manifest(json.dumps(document), "manifest.json")
    change(document)
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps(document), "manifest.json")


def test_the_command_line(bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data.parent
    clips = ["--audio", str(folder / "1.wav"), "--video", str(folder / "2.mkv")]
    assert run_app(app, ["run", str(bundle), "--text", "red", *clips, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in LABELS
    assert run_app(app, ["run", str(bundle), *clips]) == 2
    assert "--text missing; expected --text, perhaps --audio, perhaps --video" in capsys.readouterr().err
    assert run_app(app, ["run", str(bundle), "--data", str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 44
    assert rows[1]["audio"] == "1.wav"
    assert "audio" not in rows[0]
    assert rows[13]["notices"] == ["audio cut to the first 0.4 of its 0.5 seconds"]
    assert run_app(app, ["eval", str(bundle), str(data), "--json"]) == 0
    soundfile.write(tmp_path / "long.wav", tone(300, 3.0, rate=8000), 8000)
    (tmp_path / "text.wav").write_bytes(b"no sound" * 50)
    assert run_app(app, ["run", str(bundle), "--text", "red", "--audio", str(tmp_path / "long.wav")]) == 0
    assert "note: audio cut to the first 0.4 of its 3.0 seconds" in capsys.readouterr().err
    assert run_app(app, ["run", str(bundle), "--text", "red", "--audio", str(tmp_path / "text.wav")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: audio ")
    assert "is not audio that can be read" in error


def test_rows_are_read_by_what_the_model_reads(data: Path, tmp_path: Path) -> None:
    read = {"modalities": ("text", "audio", "video")}
    first = next(iter(open_samples(data, **read, optional=("audio", "video"))))
    assert (first.audio, first.video, set(first.named)) == (None, None, {"text"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: audio missing"):
        list(open_samples(data, **read))
    with pytest.raises(DataError, match=r":1: video"):
        list(open_samples(data, **read, optional=("audio",)))
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "audio": "absent.wav", "label": "x"}\n')
    with pytest.raises(DataError, match=r"audio .*absent.wav does not exist"):
        list(open_samples(tmp_path / "rows.jsonl", modalities=("text", "audio")))
    with pytest.raises(UsageError, match="optional"):
        open_samples(data, modalities=("text",), optional=("audio",))


def test_sound_in_memory(bundle: Path) -> None:
    predictor = load(bundle)
    silent = predictor.predict(text="red", audio=Waveform(np.zeros(800, np.float32), 4000))
    assert silent.notices == ("audio given as an array is silent",)  # type: ignore[union-attr]
