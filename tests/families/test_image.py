"""What holds of image encoders alone, and planted faults that the common tests must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPImageProcessor

from mope_deploy.errors import ConfigError
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig
from mope_deploy.model.backbones import Form, FrozenEncoder, beit, eva, load_encoder, swin, timm_attention
from mope_deploy.model.backbones.bert import BertEncoder
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.build import assemble
from mope_deploy.preprocess import Preprocessing, TextSpec
from tests.families.conftest import inputs_of
from tests.families.row import image_folder
from tests.families.table import by_name
from tests.families.test_family import close, run_oracle, sample
from tests.tiny import LABELS, timm_folder

Models = Callable[..., MoPE]


def differs_from_the_oracle(trained: MoPE, name: str, form: Form = "prefix") -> bool:
    inputs = inputs_of(trained, batch=2, text_length=5, double=True)
    with torch.no_grad():
        logits = trained(inputs, form=form).logits.numpy()
    expected, _ = run_oracle(trained, (by_name(name), by_name("BERT")), inputs)
    return bool(np.abs(logits - expected).max() > 1e-4 * np.abs(expected).max())


def test_windows_that_see_another_samples_prompts_are_noticed(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak of a window order that is batch-major beside prompts that are batch-minor."""
    trained = copy.deepcopy(model("Swin", "BERT")).double()
    inputs = inputs_of(trained, batch=16, double=True)

    def leaking(prompts: Tensor, W: int) -> Tensor:
        return prompts.repeat(W, 1, 1, 1)  # window after window instead of sample after sample

    monkeypatch.setattr(swin, "_in_each", leaking)
    with torch.no_grad():
        together = trained(inputs).logits
        errors = [(trained(sample(inputs, i)).logits[0] - together[i]).abs().max() for i in range(16)]
    assert max(errors) > 1e-3 * together.abs().max()
    assert differs_from_the_oracle(trained, "Swin")


@pytest.mark.parametrize("fault", ["a bias for prompts", "no shift"])
def test_faults_in_a_swin_block_are_noticed(fault: str, model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = copy.deepcopy(model("Swin", "BERT")).double()
    assert not differs_from_the_oracle(trained, "Swin")
    if fault == "no shift":
        for stage in trained.main.encoder.layers:
            stage.blocks[1].attn_mask = None
    else:
        monkeypatch.setattr(swin, "prompts_seen", lambda x, P: torch.nn.functional.pad(x, (0, P), value=0.5))
    assert differs_from_the_oracle(trained, "Swin")


@pytest.mark.parametrize("name", ["EVA02", "DINOv3", "RoPE-ViT"])
def test_prompts_with_a_position_are_noticed(name: str, model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = copy.deepcopy(model(name, "BERT")).double()
    assert not differs_from_the_oracle(trained, name)
    right = timm_attention._rotated

    def all_turned(attention: Any, x: Tensor, tokens: int, angles: Tensor) -> Tensor:
        P = x.shape[2] - tokens
        found = right(attention, x, tokens, angles)
        if P == 0:
            return found
        turned = apply_rot_embed_cat(x[:, :, tokens:], angles[..., -P:, :], half=attention.rotate_half)
        return torch.cat([found[:, :, :-P], turned], dim=2)

    monkeypatch.setattr(timm_attention, "_rotated", all_turned)
    assert differs_from_the_oracle(trained, name)
    assert not differs_from_the_oracle(trained, name, "token")
    monkeypatch.setattr(eva, "_no_angle", lambda tokens, *, like: like[..., -tokens:, :])
    assert differs_from_the_oracle(trained, name, "token")


@pytest.mark.parametrize("own", [True, False], ids=["each layer's bias", "one bias for all"])
def test_a_bias_for_prompts_is_noticed_in_beit(
    own: bool, model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each form apart: they share no code that extends a bias."""
    trained = copy.deepcopy(model("BEiT", "BERT")).double()
    if not own:  # BEiT's pretraining checkpoints; the library never makes both
        encoder = trained.main.encoder
        folder = image_folder("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True)(tmp_path)
        trained.main = load_encoder(EncoderSpec(modality="image", source=f"dir:{folder}")).backbone.double()
        assert encoder.rel_pos_bias is None
        assert trained.main.encoder.rel_pos_bias is not None
    inputs = inputs_of(trained, batch=2, text_length=5, double=True)

    def logits(form: Form) -> Tensor:
        with torch.no_grad():
            return trained(inputs, form=form).logits

    right = logits("token")
    assert close(logits("prefix"), right, 1e-11)
    if own:
        assert not differs_from_the_oracle(trained, "BEiT", "token")
    seen, pad = beit.prompts_seen, torch.nn.functional.pad
    monkeypatch.setattr(beit, "prompts_seen", lambda bias, P: pad(bias, (0, P), value=0.5))
    assert not close(logits("prefix"), right, 1e-4)
    assert torch.equal(logits("token"), right)
    monkeypatch.setattr(beit, "prompts_seen", seen)
    monkeypatch.setattr(beit.nn.functional, "pad", lambda bias, places: pad(bias, places, value=0.5))
    assert not close(logits("token"), right, 1e-4)
    assert close(logits("prefix"), right, 1e-11)


def test_every_block_of_swin_is_as_wide_as_its_stage(model: Models) -> None:
    trained = model("Swin", "BERT")
    assert trained.main.widths == (16, 16, 32, 32)
    assert [layer.experts.prompts.shape[2] for layer in trained.layers] == [16, 16, 32, 32]
    names = {name for name in trained.trained_parameters() if name.startswith("mappers.text.up")}
    assert names == {f"mappers.text.up.{width}.{kind}" for width in (16, 32) for kind in ("weight", "bias")}


def test_an_encoder_of_one_width_keeps_the_names_of_its_tensors(model: Models) -> None:
    """Checkpoints from before there were several widths still load."""
    names = {name for name in model("ViT", "BERT").trained_parameters() if name.startswith("mappers")}
    assert names == {f"mappers.text.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}


def test_swin_b_and_bert_base_train_what_the_paper_says(model: Models) -> None:
    """1.6 M parameters at K = 4 and L = 6, on 0.2 G frozen ones; encoders without memory behind them."""
    with torch.device("meta"):
        image = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
        text = BertModel(BertConfig(), add_pooling_layer=False)
    specs = (
        EncoderSpec(modality="image", source="timm:swin_base_patch4_window7_224.ms_in22k"),
        EncoderSpec(modality="text", source="hf:google-bert/bert-base-uncased", prompts=4),
    )
    config = MoPEConfig(main=specs[0], complementary=specs[1:], labels=LABELS)
    encoders = {
        "image": swin.SwinEncoder.wrap(LoadedEncoder(image, "swin_base_patch4_window7_224"), specs[0]),
        "text": FrozenEncoder(BertEncoder(text, max_length=128), TextSpec(max_length=128, pad_id=0)),
    }
    for encoder in encoders.values():
        encoder.backbone.requires_grad_(False)
    built = assemble(MoPE, config, encoders, preprocessing=model("ViT", "BERT").preprocessing)
    assert len(built.layers) == 24
    assert built.main.widths == (128,) * 2 + (256,) * 2 + (512,) * 18 + (1024,) * 2
    trained = sum(value.numel() for value in built.trained_parameters().values())
    assert 1.55e6 < trained < 1.65e6


def test_an_architecture_that_takes_its_size_from_its_tag_is_stored_with_it(tmp_path: Path) -> None:
    """Without ``img_size`` among its arguments: 256 pixels, where the class itself would say 224."""
    small = {"patch_size": 64, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
    folder = timm_folder(tmp_path / "siglip", "vit_base_patch16_siglip_256", **small)
    loaded = load_encoder(EncoderSpec(modality="image", source=f"dir:{folder}"))
    assert (loaded.preprocess.height, loaded.preprocess.width) == (256, 256)


@pytest.mark.parametrize(
    "steps",
    [
        {"size": {"height": 20, "width": 28}, "resample": 2},
        {
            "size": {"shortest_edge": 24},
            "do_center_crop": True,
            "crop_size": {"height": 20, "width": 18},
            "resample": 3,
        },
    ],
)
def test_transformers_image_processors_are_followed(steps: dict[str, object], tmp_path: Path) -> None:
    """To within two grey levels: its resize rounds differently from Pillow's."""
    folder = by_name("ResNet (transformers)").make(tmp_path / "resnet")
    processor = CLIPImageProcessor(**({"do_center_crop": False, "do_convert_rgb": False} | steps))
    processor.save_pretrained(folder)
    spec = load_encoder(EncoderSpec(modality="image", source=f"dir:{folder}")).preprocess
    ramp = np.linspace(0, 255, 50 * 40 * 3).reshape(50, 40, 3)
    picture = (ramp + 40 * np.sin(np.arange(40) / 5)[None, :, None]).clip(0, 255).astype(np.uint8)
    preprocessing = Preprocessing(image=spec, text=None, tokenizer=None)
    ours = preprocessing.normalise(preprocessing.load_image(picture)[None])
    theirs = processor(picture, return_tensors="np")["pixel_values"]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2.1 / 255 / min(processor.image_std)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"size": {"shortest_edge": 24}, "do_center_crop": False}, "expected height and width, or shortest_edge"),
        ({"size": {"height": 20, "width": 28}, "do_center_crop": False, "rescale_factor": 1 / 127.5}, "scale of 1/255"),
    ],
)
def test_other_steps_of_an_image_processor_are_refused(steps: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = by_name("ResNet (transformers)").make(tmp_path / "resnet")
    CLIPImageProcessor(**steps).save_pretrained(folder)
    with pytest.raises(ConfigError, match=message):
        load_encoder(EncoderSpec(modality="image", source=f"dir:{folder}"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="no usable image processor"):
        load_encoder(EncoderSpec(modality="image", source=f"dir:{folder}"))
