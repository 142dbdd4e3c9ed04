"""Prefix form against token form, for every family that has it: values, gradients, rounding, and what is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import vision_transformer
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2AttnAdapterLayer

from mope_deploy.model import EncoderSpec, MoPE
from mope_deploy.model.backbones import LayeredEncoder, load_encoder
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.videomae import VideoMAEEncoder
from mope_deploy.model.backbones.vit import ViTEncoder
from tests.families.conftest import inputs_of
from tests.families.table import MAIN, Family, by_name, partner
from tests.families.test_family import close, double, run_oracle
from tests.tiny import timm_folder

mains = pytest.mark.parametrize("family", MAIN, ids=lambda family: family.name)
PREFIXED = [family for family in MAIN if family.prefix_form]
prefixed = pytest.mark.parametrize("family", PREFIXED, ids=lambda family: family.name)
Models = Callable[..., MoPE]
Folders = Callable[[Family], Path]


def backbone_of(family: Family, folder: Folders) -> LayeredEncoder:
    return load_encoder(EncoderSpec(modality=family.modality, source=f"dir:{folder(family)}")).backbone


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@mains
def test_the_table_says_which_families_have_it(family: Family, folder: Folders) -> None:
    assert backbone_of(family, folder).has_prefix_form == (family.prefix_form)


@prefixed
@pytest.mark.parametrize("role", ["main", "complementary"])
def test_values_and_gradients_are_those_of_the_token_form(family: Family, role: str, model: Models) -> None:
    """Of every trained tensor, on a padded batch, in float64."""
    names = (family.name, partner(family).name)
    trained = double(model(*(names if role == "main" else names[::-1])))
    inputs = inputs_of(trained, batch=5, double=True)
    found = {}
    for form in ("token", "prefix"):
        trained.zero_grad()
        out = trained(inputs, form=form)
        nn.functional.cross_entropy(out.logits, torch.arange(5) % 3).backward()
        gradients = {name: p.grad.clone() for name, p in trained.trained_parameters().items()}
        found[form] = {"logits": out.logits.detach(), "routing": out.routing.detach()} | gradients
    assert len(found["token"]) > 2 + trained.main.depth
    for name, value in found["token"].items():
        assert value.abs().max() > 0, name
        assert close(found["prefix"][name], value, max(1e-10, 10 * family.tolerance)), name


@mains
def test_the_token_form_equals_the_oracle(family: Family, model: Models) -> None:
    """The definition; the prefix form is compared with the oracle in test_family.py."""
    rows = family, partner(family)
    trained = double(model(rows[0].name, rows[1].name))
    inputs = inputs_of(trained, batch=2, text_length=5, double=True)
    with torch.no_grad():
        out = trained(inputs, form="token").logits.numpy()
    logits, _ = run_oracle(trained, rows, inputs)
    np.testing.assert_allclose(out, logits, rtol=0, atol=family.tolerance * np.abs(logits).max())


@prefixed
def test_keys_and_values_may_be_made_beforehand(family: Family, folder: Folders) -> None:
    """Any split of the prompts into tokens and ready keys and values; and each part does matter."""
    backbone = backbone_of(family, folder).double()
    inputs = states(backbone, family)
    x, mask = backbone.embed(inputs)
    with torch.no_grad():
        for i in range(backbone.depth):
            P, D = 5, backbone.widths[i]
            prompts = drawn(len(x), P, D, seed=i)
            expected = backbone.layer(i, x, prompts, mask)
            for made in (0, 2, P):
                tokens = prompts[:, made:] if made < P else None
                kv = PrefixKV.of(backbone.projection(i)(prompts[:, :made])) if made else None
                found = backbone.prefix_layer(i, x, tokens, mask, kv)
                assert close(found, expected, family.tolerance), (i, made)
                if kv is not None:
                    for part in (kv.keys[0], kv.values[0]):
                        part += 0.1 * torch.arange(part.shape[-1]) % 3
                        assert not close(backbone.prefix_layer(i, x, tokens, mask, kv), found, 1e-4), (i, made)
            x = expected


def states(backbone: LayeredEncoder, family: Family) -> dict[str, Tensor]:
    """Inputs of one encoder, in its own dtype."""
    if family.modality == "text":
        mask = (torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]).long()
        return {"input_ids": torch.full((3, 6), 5) + torch.arange(6), "attention_mask": mask}
    config = getattr(backbone.encoder, "config", None)
    shape: tuple[int, ...]
    if family.modality == "image":
        shape = (3, *backbone.encoder.patch_embed.img_size)
    elif family.modality == "video":
        shape = (config.num_frames, 3, config.image_size, config.image_size)
    elif family.name == "Whisper":
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    else:
        shape = (150,)  # samples
    inputs = {backbone.input_names[0]: drawn(3, *shape).to(next(backbone.parameters()).dtype)}
    if "audio_mask" in backbone.input_names:
        inputs["audio_mask"] = (torch.arange(150)[None] < torch.tensor([150, 90, 40])[:, None]).long()
    return inputs


@prefixed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_rounds_no_more_than_the_token_form(family: Family, dtype: torch.dtype, folder: Folders) -> None:
    """A tolerance earned: error against float64 at most twice that of the token form, over hundreds of values.

    Root mean squares: with SSE, AVX2 and AVX-512 kernels their ratio is 0.88 to 1.11.
    """
    backbone = backbone_of(family, folder)
    exact = copy.deepcopy(backbone.to(dtype)).double()  # the same weights, already rounded
    inputs = states(backbone, family)
    x, mask = backbone.embed(inputs)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    _, wide_mask = exact.embed(wide)
    errors: dict[str, list[Tensor]] = {"token": [], "prefix": []}
    with torch.no_grad():
        for i in range(backbone.depth):
            prompts = drawn(len(x), 5, backbone.widths[i], seed=i).to(dtype)
            truth = exact.layer(i, x.double(), prompts.double(), wide_mask)
            for form, found in errors.items():
                y = backbone.run_layer(i, x, prompts, mask, form=form)
                found.append((y.double() - truth).flatten())
            x = backbone.layer(i, x, prompts, mask)
    token, prefix = (torch.cat(found) for found in (errors["token"], errors["prefix"]))
    assert token.numel() >= 128
    assert 0 < prefix.norm() <= 2 * token.norm()


@prefixed
def test_prompts_reach_neither_queries_nor_mlp(family: Family, folder: Folders) -> None:
    """No linear layer behind the attention sees more rows than x has; in token form they do."""
    backbone = backbone_of(family, folder).double()
    x, mask = backbone.embed(states(backbone, family))
    rows: list[int] = []
    for module in backbone.encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: rows.append(args[0].numel() // args[0].shape[-1]))
    made = drawn(len(x), 4, backbone.width)
    tokens = x.shape[0] * x.shape[1]
    with torch.no_grad():
        kv = PrefixKV.of(backbone.projection(0)(made))
        backbone.prefix_layer(0, x, None, mask, kv)
        if family.name != "Swin":  # its windows hang over the edge
            assert set(rows) == {tokens}
        alone = list(rows)
        rows.clear()
        backbone.layer(0, x, None, mask)
        assert set(rows) == set(alone)
        rows.clear()
        backbone.layer(0, x, made, mask)
        assert max(rows) > max(alone)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True, "qkv_bias": False}),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}),
        ("eva02_base_patch14_224", {"qkv_fused": True, "init_values": 0.1}),
        ("eva02_base_patch14_224", {"qk_norm": True, "scale_attn_inner": True}),
        ("vit_small_patch16_dinov3", {"attn_type": "rope", "num_reg_tokens": 2}),
    ],
)
def test_other_attentions_of_the_library(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    made = timm_folder(tmp_path / "encoder", architecture, **(sizes | changes))
    backbone = load_encoder(EncoderSpec(modality="image", source=f"dir:{made}")).backbone.double()
    assert backbone.has_prefix_form
    x, mask = backbone.embed({"pixel_values": drawn(3, 3, 32, 24)})
    with torch.no_grad():
        for i in range(2):
            prompts = drawn(3, 5, 32, seed=i)
            expected = backbone.layer(i, x, prompts, mask)
            kv = PrefixKV.of(backbone.projection(i)(prompts[:, :3]))
            assert close(backbone.prefix_layer(i, x, prompts[:, 3:], mask, kv), expected, 1e-6)
            x = expected


@pytest.mark.parametrize("block", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"])
def test_blocks_of_another_shape_keep_the_token_form(block: str) -> None:
    backbone = vit_of(block_fn=getattr(vision_transformer, block))
    assert not backbone.has_prefix_form
    x, prompts = drawn(2, 17, 32), drawn(2, 3, 32)
    found = backbone.run_layer(0, x, prompts, None, form="prefix")
    assert torch.equal(found, backbone.layer(0, x, prompts, None))


def test_a_gate_opens_for_the_tokens_alone() -> None:
    backbone = vit_of()
    backbone.encoder.blocks[0].attn = vision_transformer.Attention(32, num_heads=4, gated=True).double()
    x, prompts = drawn(2, 17, 32), drawn(2, 3, 32)
    assert backbone.has_prefix_form
    assert close(backbone.prefix_layer(0, x, prompts, None), backbone.layer(0, x, prompts, None), 1e-11)


def test_a_wav2vec2_may_have_adapters_in_its_layers(folder: Folders) -> None:
    backbone = backbone_of(by_name("wav2vec 2.0"), folder)
    layer = backbone.encoder.encoder.layers[0]
    layer.adapter_layer = Wav2Vec2AttnAdapterLayer(SimpleNamespace(hidden_size=16, adapter_attn_dim=4))
    backbone.double()
    x, prompts, mask = drawn(2, 6, 16), drawn(2, 3, 16), torch.ones(2, 6).long()
    assert close(backbone.prefix_layer(0, x, prompts, mask), backbone.layer(0, x, prompts, mask), 1e-11)


def test_whisper_stays_finite_at_half_precision(folder: Folders) -> None:
    """Where the sum of a layer overflows it is clamped, as in the library."""
    backbone = backbone_of(by_name("Whisper"), folder).half()
    x, prompts = 65000 + drawn(2, 12, 16).half(), drawn(2, 3, 16).half()
    backbone.encoder.layers[1].fc2.bias += 2000
    found = backbone.prefix_layer(1, x, prompts, None)
    assert found.isfinite().all()
    assert torch.equal(found, backbone.layer(1, x, prompts, None))


def test_a_videomae_with_biases_of_its_own_keeps_the_token_form(folder: Folders) -> None:
    """As transformers 5.0 builds it."""
    encoder = backbone_of(by_name("VideoMAE"), folder).encoder
    encoder.encoder.layer[1].attention.attention.q_bias = None
    assert not VideoMAEEncoder(encoder, preprocessor={}).has_prefix_form


def vit_of(**changes: Any) -> ViTEncoder:
    encoder = vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, **changes
    )
    return ViTEncoder(encoder).double().eval()
