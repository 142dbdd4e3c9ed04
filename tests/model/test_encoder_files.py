"""What stands in an encoder's folder: weights that are its own, and processors wherever transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    VideoMAEImageProcessor,
    VideoMAEVideoProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mope_deploy.errors import ConfigError
from mope_deploy.model import EncoderSpec
from mope_deploy.model.backbones import FrozenEncoder, load_encoder
from tests.media import Encoders, audio_folder, video_folder
from tests.tiny import bert_folder, vit_folder

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load(folder: Path, modality: str = "text", **spec: Any) -> FrozenEncoder:
    return load_encoder(EncoderSpec(modality=modality, source=f"dir:{folder}", **spec))


def refused(folder: Path, modality: str = "text", **spec: Any) -> str:
    """The one line that the folder is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(folder, modality, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The folder's weights, changed."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


NAME = "encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: torch.full_like(w, torch.nan), f"values of {NAME}; received NaN or an infinity"),
        (lambda w: (9 * w).int(), f"type of {NAME} of dir:.*; received I32; expected F64 or F32"),
        (lambda w: w > 0, f"type of {NAME} of dir:.*; received BOOL"),
        (lambda w: w[:4, :4].contiguous(), rf"shape of {NAME}; received \(4, 4\); expected \(16, 24\)"),
    ],
)
def test_weights_that_no_training_leaves_are_refused(change: Any, why: str, bert: Path, tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    rewrite(made, lambda state: state | {NAME: change(state[NAME])})
    with pytest.raises(ConfigError, match=why) as caught:
        load(made)
    assert "\n" not in str(caught.value)


def test_half_precision_on_disk_is_read_as_it_is(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    rewrite(made, lambda state: {name: tensor.half() for name, tensor in state.items()})
    found = load(made).backbone.encoder.state_dict()
    assert torch.equal(found[NAME], load_file(made / WEIGHTS)[NAME].float())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_what_a_model_does_not_read_of_its_own_weights_is_refused(prefix: str, tmp_path: Path) -> None:
    """Heads of other tasks may be left over: those stand beside the encoder."""
    made = bert_folder(tmp_path / "bert")
    heads = {"cls.predictions.bias": torch.zeros(13), "classifier.weight": torch.zeros(2, 16)}
    buffers = {"bert.embeddings.position_ids": torch.arange(40)[None]}
    rewrite(made, lambda state: {prefix + name: tensor for name, tensor in state.items()} | heads | buffers)
    load(made)
    rows, size = {"rows": torch.zeros(7, 8)}, 3
    relative = prefix + "encoder.layer.1.attention.self.distance_embedding.weight"
    rewrite(made, lambda state: state | {relative: rows["rows"]})
    assert f"does not read; received {relative}; expected" in refused(made)
    adapters = {f"{prefix}encoder.layer.0.attention.self.{name}.lora_A.weight": torch.zeros(2, 16) for name in "abcd"}
    rewrite(made, lambda state: {name: tensor for name, tensor in state.items() if name != relative} | adapters)
    line = refused(made)
    assert line.count("lora_A") == size
    assert "and 1 more" in line


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    AutoModel.from_pretrained(made).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    (tmp_path / "shards" / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    assert load(tmp_path / "shards").backbone.fingerprint() == load(made).backbone.fingerprint()
    shard = next((tmp_path / "shards").glob("model-00002*"))
    shard.unlink()
    assert shard.name in refused(tmp_path / "shards")


def test_what_is_wrong_with_a_timm_folder_is_shown(tmp_path: Path) -> None:
    made = vit_folder(tmp_path / "vit")
    name, good = "blocks.1.mlp.fc1.weight", load_file(made / WEIGHTS)
    for wrong, why in (
        (good | {name: torch.zeros(3, 3)}, f"size mismatch for {name}"),
        ({key: value for key, value in good.items() if key != name}, f'Missing key(s) in state_dict: "{name}"'),
        (good | {"stowaway": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "stowaway"'),
        (good | {name: good[name].int()}, f"type of {name} of dir:"),
        (good | {name: good[name] / 0}, f"values of {name}"),
    ):
        save_file(wrong, made / WEIGHTS)
        assert why in refused(made, "image")
    save_file(good, made / WEIGHTS)
    config = json.loads((made / CONFIG).read_text())
    for change in (
        {"pretrained_cfg": None},
        {"pretrained_cfg": {"mean": "abc"}},
        {"model_args": [1]},
        {"architecture": 5},
    ):
        (made / CONFIG).write_text(json.dumps(config | change))
        refused(made, "image")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


def processor(folder: Path, **files: object) -> Path:
    """The folder with these files and no other of a processor."""
    for name in ("preprocessor_config", "processor_config", "video_preprocessor_config"):
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if name in files:
            path.write_text(json.dumps(files[name]))
    return folder


def test_sound_is_prepared_as_its_processor_says_wherever_that_stands(tmp_path: Path) -> None:
    made = audio_folder(tmp_path / "wave", "wav2vec2")
    slow = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False).to_dict()
    usual = Wav2Vec2FeatureExtractor().to_dict()
    for files, rate in (
        ({"processor_config": {"processor_class": "Wav2Vec2Processor", "feature_extractor": slow}}, 8000),
        ({"processor_config": {"feature_extractor": slow}, "preprocessor_config": usual}, 8000),
        ({"processor_config": {"processor_class": "Wav2Vec2Processor"}, "preprocessor_config": usual}, 16000),
        ({"preprocessor_config": slow}, 8000),
    ):
        spec: Any = load(processor(made, **files), "audio", max_seconds=0.3).preprocess
        theirs = Wav2Vec2FeatureExtractor.from_pretrained(made)
        assert (spec.sample_rate, spec.normalise) == (theirs.sampling_rate, theirs.do_normalize) == (rate, rate > 8000)
    for files, why in (
        ({}, "no processor beside dir:"),
        ({"processor_config": {"processor_class": "X"}}, "no processor beside dir:"),
        ({"processor_config": {"feature_extractor": [1]}}, "feature_extractor; received an array"),
        ({"preprocessor_config": slow | {"sampling_rate": "8000"}}, "sampling_rate: received '8000', expected"),
        ({"preprocessor_config": slow | {"sampling_rate": -8000}}, "sampling_rate: received -8000"),
        ({"preprocessor_config": slow | {"do_normalize": 1}}, "do_normalize: received 1, expected"),
        ({"preprocessor_config": slow | {"feature_extractor_type": "EncodecFeatureExtractor"}}, "EncodecFeature"),
    ):
        assert why in refused(processor(made, **files), "audio", max_seconds=0.3)


def test_a_spectrogram_is_as_its_processor_says(tmp_path: Path) -> None:
    made = audio_folder(tmp_path / "whisper", "whisper")
    values = WhisperFeatureExtractor(feature_size=10, sampling_rate=1000, hop_length=50, chunk_length=1.2, n_fft=64)
    nested = {key: value for key, value in values.to_dict().items() if key != "mel_filters"}
    spec: Any = load(processor(made, processor_config={"feature_extractor": nested}), "audio").preprocess
    assert (spec.sample_rate, spec.hop, spec.n_fft, spec.mels, spec.max_samples) == (1000, 50, 64, 10, 1200)
    for change in ({"feature_size": 80}, {"chunk_length": 30}, {"n_fft": "64"}, {"hop_length": 0}):
        refused(processor(made, processor_config={"feature_extractor": nested | change}), "audio")
    assert "no processor beside" in refused(processor(made), "audio")


def test_video_is_prepared_as_its_processor_says_wherever_that_stands(tmp_path: Path) -> None:
    made = video_folder(tmp_path / "video")
    size: dict[str, Any] = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}
    video = json.loads(VideoMAEVideoProcessor(image_mean=[0.1, 0.2, 0.3], **size).to_json_string())
    image = json.loads(VideoMAEImageProcessor(image_mean=[0.4, 0.5, 0.6], **size).to_json_string())
    for files, mean in (
        ({"processor_config": {"video_processor": video}, "preprocessor_config": image}, 0.1),
        ({"video_preprocessor_config": video, "preprocessor_config": image}, 0.1),
        ({"processor_config": {"image_processor": image}}, 0.4),
        ({"preprocessor_config": image}, 0.4),
    ):
        spec: Any = load(processor(made, **files), "video").preprocess
        assert spec.image.mean[0] == mean
        assert (spec.image.resize_height, spec.image.height) == (18, 16)
    for change in (
        {"size": "abc"}, {"size": {"longest_edge": 4}}, {"image_mean": "abc"}, {"image_std": [1]}, {"resample": 9},
        {"do_rescale": 0}, {"rescale_factor": 1.0}, {"crop_size": 8},
    ):  # fmt: skip
        refused(processor(made, preprocessor_config=image | change), "video")
    assert "no processor beside" in refused(processor(made), "video")
