"""Tiny random encoders in their libraries' own folder formats, and inputs of awkward sizes. No downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from mope_deploy.model.backbones import families
from mope_deploy.model.backbones.sources import LoadedEncoder

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "blue", "card", "shows", "a", "seven", "two")
LABELS = ("entailment", "neutral", "contradiction")


def scatter_weights(module: nn.Module, *, seed: int) -> None:
    """Give every tensor random values: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            centre = 1.0 if ("norm" in name.lower() and name.endswith("weight")) or "gamma" in name else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def vit_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A ViT of 32×24 pixels in 8×8 patches, width 32, 2 layers; ``changes`` are timm's model_args."""
    args = {
        "img_size": (32, 24),
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2,
    } | changes
    return timm_folder(folder, "vit_tiny_patch16_224", seed=seed, **args)


def timm_folder(folder: Path, architecture: str, *, seed: int = 0, **model_args: Any) -> Path:
    """An encoder of timm's with random weights."""
    encoder = timm.create_model(architecture, num_classes=0, **model_args)
    scatter_weights(encoder, seed=seed)
    family = next(family for family in families() if family.accepts(encoder))
    spec = EncoderSpec(modality="image", source=f"timm:{architecture}")
    family.wrap(LoadedEncoder(encoder, architecture, model_args), spec).backbone.save_source(folder)
    return folder


def bert_folder(folder: Path, *, seed: int = 1, model_type: str = "bert", **changes: Any) -> Path:
    """A BERT-like encoder of width 16 with 2 layers and a word-level tokenizer, unless ``changes`` say otherwise."""
    values = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    } | changes
    if model_type == "electra":
        values |= {"embedding_size": 8}
    encoder = AutoModel.from_config(AutoConfig.for_model(model_type, **values))
    scatter_weights(encoder, seed=seed)
    encoder.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_config(vit: Path, bert: Path, **changes: Any) -> MoPEConfig:
    """A small MoPE with every prompt kind on; ``prompts`` sets the static prompts of the text encoder."""
    text = EncoderSpec(modality="text", source=f"dir:{bert}", prompts=changes.pop("prompts", 3))
    values = {"labels": LABELS, "prompt_length": 3, "experts": 5, "d_x": 2, "d_y": 4} | changes
    return MoPEConfig(main=EncoderSpec(modality="image", source=f"dir:{vit}"), complementary=(text,), **values)


def tiny_model(vit: Path, bert: Path, *, seed: int = 0, **changes: Any) -> MoPE:
    """A built tiny MoPE whose trained tensors are large enough to matter."""
    model = build_model(tiny_config(vit, bert, **changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if name.endswith((".tokens", ".prompts")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny_inputs(
    batch: int = 5, text_length: int = 7, *, seed: int = 0, size: tuple[int, int] = (32, 24)
) -> dict[str, Tensor]:
    """Images and padded texts; row i has text_length − (i mod text_length) real tokens, at least 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([text_length - i % text_length for i in range(batch)])
    mask = (torch.arange(text_length)[None] < lengths[:, None]).long()
    ids = torch.randint(4, len(WORDS), (batch, text_length), generator=generator)
    return {
        "pixel_values": torch.randn(batch, 3, *size, generator=generator),
        "input_ids": ids * mask,
        "attention_mask": mask,
    }
