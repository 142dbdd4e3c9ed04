"""Any modality as the main one, one or more complementary ones, and samples that lack one of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from mope_deploy.model.backbones import load_encoder
from mope_deploy.preprocess import Preprocessing
from tests.media import Encoders, audio_folder, lone, make_inputs, media_model, raw_samples
from tests.tiny import LABELS

COMBINATIONS = (
    ("image", "text"),
    ("text", "image"),
    ("text", "wav2vec2"),
    ("text", "wav2vec2", "videomae-fine-tuned"),
    ("wav2vec2", "text"),
    ("hubert-group", "videomae-last-norm"),
    ("whisper", "text", "image"),
    ("videomae", "wav2vec2-group", "text", "image"),
)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("media-encoders"))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_any_modality_is_main_and_any_others_condition_it(kinds: tuple[str, ...], encoders: Encoders) -> None:
    """Own mapper and router input for each, batch invariance, and a training step that moves what trains alone."""
    model = media_model(encoders, *kinds, temperature=1.0)
    others = [spec.modality for spec in model.config.complementary]
    assert list(model.mappers) == others
    for layer in model.layers:
        assert layer.router is not None
        assert list(layer.router.project_y) == others
        assert layer.router.embeddings.shape == (5, 2 + 4 * len(others))
    inputs = make_inputs(model.preprocessing, raw_samples(6))
    assert set(inputs) == set(model.input_names) == set(model.preprocessing.tensors)
    with torch.no_grad():
        together = model(inputs)
        for i in range(6):
            assert close(model(lone(inputs, i)).logits[0], together.logits[i])
    for name in others:  # every modality reaches the prediction
        mixed = make_inputs(
            model.preprocessing,
            [s | {name: t[name]} for s, t in zip(raw_samples(6), raw_samples(6, seed=1), strict=True)],
        )
        with torch.no_grad():
            assert not close(model(mixed).logits, together.logits), name
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    model.train()
    optimiser = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01)
    nn.functional.cross_entropy(model(inputs).logits, torch.arange(6) % 3).backward()
    optimiser.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert not [name for name, value in trained.items() if torch.equal(model.get_parameter(name), value)]


def test_a_missing_modality_is_replaced_by_what_was_learned(encoders: Encoders, tmp_path) -> None:
    model = media_model(encoders, "text", "wav2vec2", "videomae", missing=("audio", "video"), temperature=1.0)
    assert {"stand_ins.audio", "stand_ins.video"} <= set(model.trained_parameters())
    samples = raw_samples(6, missing=("audio", "video"))
    inputs = make_inputs(model.preprocessing, samples)
    assert inputs["audio_present"].tolist() == [0, 1, 1, 0, 1, 1]
    assert inputs["video_present"].tolist() == [1, 0, 1, 1, 0, 1]
    with torch.no_grad():
        before = model(inputs).logits
        # What stands in the arrays of a missing clip is nobody's business.
        for name, values in (("audio", "audio_values"), ("video", "video_values")):
            other = dict(inputs)
            other[values] = torch.where(
                inputs[f"{name}_present"].reshape(-1, *[1] * (inputs[values].ndim - 1)) > 0, inputs[values], 3.0
            )
            assert torch.equal(model(other).logits, before)
        y = model.encode_complementary(inputs)
        assert close(model(inputs, y=y).logits, before)
        for i in range(6):
            assert close(model(lone(inputs, i)).logits[0], before[i])
        model.stand_ins["audio"] += 1.0
        moved = (model(inputs).logits - before).abs().amax(1) > 1e-6
        assert moved.tolist() == [True, False, False, True, False, False]
        model.stand_ins["audio"] -= 1.0
    model.train()
    nn.functional.cross_entropy(model(inputs).logits, torch.arange(6) % 3).backward()
    assert all(model.stand_ins[name].grad.abs().sum() > 0 for name in ("audio", "video"))
    model.eval().save_pretrained(tmp_path / "checkpoint", standalone=True)
    loaded = MoPE.from_pretrained(tmp_path / "checkpoint")
    assert loaded.preprocessing == model.preprocessing
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model(inputs).logits)


def test_without_a_stand_in_a_missing_modality_is_an_error(encoders: Encoders) -> None:
    model = media_model(encoders, "text", "wav2vec2")
    with pytest.raises(UsageError, match="audio is missing"):
        make_inputs(model.preprocessing, raw_samples(3, missing=("audio",)))


@pytest.mark.parametrize("missing", [("text",), ("image",), ("audio", "audio"), ("smell",)])
def test_only_complementary_modalities_may_be_missing(missing: tuple[str, ...], encoders: Encoders) -> None:
    with pytest.raises(ConfigError, match="missing"):
        media_model(encoders, "text", "wav2vec2", missing=missing)


def test_lengths_that_an_encoder_cannot_read_are_refused(encoders: Encoders) -> None:
    for kind, seconds in (("wav2vec2", 0.01), ("wav2vec2", 1e6), ("whisper", 1.0)):
        with pytest.raises(ConfigError, match="max_seconds"):
            load_encoder(EncoderSpec(modality="audio", source=f"dir:{encoders[kind]}", max_seconds=seconds))
    for changes in ({"modality": "text", "max_seconds": 1.0}, {"modality": "audio", "max_length": 9}):
        with pytest.raises(ConfigError, match="max_"):
            MoPEConfig(
                main=EncoderSpec(modality="image", source="dir:a"),
                complementary=(EncoderSpec(source="dir:b", **changes),),
                labels=LABELS,
            )


def test_group_norm_means_one_length_layer_norm_any(encoders: Encoders) -> None:
    """Padding would change what a group norm makes of a clip: the arrays have one length, whatever the batch."""
    for kind, fixed in (
        ("wav2vec2-group", True),
        ("hubert-group", True),
        ("wav2vec2", False),
        ("hubert-post-norm", False),
    ):
        spec = EncoderSpec(modality="audio", source=f"dir:{encoders[kind]}", max_seconds=0.4)
        made = Preprocessing(None, None, audio=load_encoder(spec).preprocess)
        lengths = {make_inputs(made, [sample])["audio_values"].shape[1] for sample in raw_samples(4)}
        assert (lengths == {400}) if fixed else (len(lengths) > 1)


def test_a_whisper_encoder_comes_out_of_the_whole_model(encoders: Encoders, tmp_path) -> None:
    """From the folder of encoder and decoder, and again from what was saved of the encoder alone."""
    spec = EncoderSpec(modality="audio", source=f"dir:{encoders['whisper']}")
    first = load_encoder(spec)
    first.backbone.save_source(tmp_path / "encoder")
    second = load_encoder(EncoderSpec(modality="audio", source=f"dir:{tmp_path / 'encoder'}"))
    assert first.preprocess == second.preprocess
    state, again = first.backbone.encoder.state_dict(), second.backbone.encoder.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not any("decoder" in name for name in state)


def test_checkpoints_from_before_sound_and_video_still_load(encoders: Encoders) -> None:
    """Their configurations know neither ``missing`` nor ``max_seconds``; the names of tensors are what they were."""
    model = media_model(encoders, "image", "text")
    assert not [name for name in model.trained_state() if "stand_in" in name]
    values = model.config.to_dict()
    del values["missing"]
    for spec in (values["main"], *values["complementary"]):
        del spec["max_seconds"]
    assert MoPEConfig.from_dict(values) == model.config
    assert set(model.preprocessing.to_dict()) == {"image", "text"}
    assert build_model(MoPEConfig.from_dict(values)).input_names == model.input_names


def test_an_audio_encoder_with_an_adapter_is_refused(tmp_path) -> None:
    from transformers import AutoModel

    folder = audio_folder(tmp_path / "plain")
    config = AutoModel.from_pretrained(folder).config
    config.add_adapter = True
    AutoModel.from_config(config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="adapter"):
        load_encoder(EncoderSpec(modality="audio", source=f"dir:{tmp_path / 'adapter'}"))
