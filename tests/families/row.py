"""What a row of ``table.py`` is made of: its type, tiny encoders, and what the library itself computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from tests.media import audio_folder, video_folder
from tests.tiny import bert_folder, scatter_weights, timm_folder


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    Attributes:
        name: the row's key, and its name on the page.
        covers: which encoders it stands for, for the page.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        make: writes a tiny encoder with scattered random weights into a folder that does not exist yet.
        layers: how many layers of it are prompted.
        outputs: the library's own modules whose outputs are x after each layer, in order. They are hooked during the
            library's own forward pass and compared with the backbone's states, layer by layer.
        pooled: the library's own pooled feature (B, D_y) of a batch of inputs.
        oracle: an independent float64 implementation, see :mod:`tests.families.oracles`; None for encoders that are
            never run layer by layer.
        beside: the row that is the complementary encoder in the graph where this one is main; the rows between them
            need every row in each of its roles, and every fusable one beside a fusable one.
        fused: whether ONNX Runtime's attention fusion knows its attention.
        prefix_form: whether prompts can enter it as keys and values alone, besides as tokens.
        longest: tokens of the longest text of the tiny encoder; 0 for other modalities.
        tolerance: allowed max|a − b| / max|b| in float64; more only where the library itself computes in float32.
    """

    name: str
    covers: str
    modality: str
    make: Callable[[Path], Path]
    outputs: Callable[[Any], list[nn.Module]]
    pooled: Callable[[Any, Mapping[str, Tensor]], Tensor]
    oracle: Callable[[Mapping[str, NDArray[np.float64]], Any], Any] | None
    layers: int = 2
    beside: str | None = None
    fused: bool = True
    prefix_form: bool = True
    longest: int = 0
    tolerance: float = 1e-11

    @property
    def main(self) -> bool:
        """Whether it can be the main encoder: one that is run layer by layer."""
        return self.layers > 0


def timm_pooled(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """timm's own forward pass without a classifier."""
    return encoder(inputs["pixel_values"])


def blocks(encoder: Any) -> list[nn.Module]:
    """Layers of a plain timm transformer."""
    return list(encoder.blocks)


def timm_pooled_folder(architecture: str, **model_args: Any) -> Callable[[Path], Path]:
    """Makes a tiny timm encoder, the size of its picture left as it is."""
    return lambda folder: timm_folder(folder, architecture, **model_args)


def image_folder(architecture: str, **model_args: Any) -> Callable[[Path], Path]:
    """Makes a tiny timm transformer of 32×24 pixels in 8×8 patches, width 32, 2 layers."""
    args = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return timm_pooled_folder(architecture, **(args | model_args))


def vision_folder(folder: Path) -> Path:
    """A tiny ResNet of transformers' with its image processor, 32×24 pixels."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    encoder = ResNetModel(config)
    scatter_weights(encoder, seed=2)
    encoder.save_pretrained(folder)
    size = {"height": 32, "width": 24}
    ViTImageProcessor(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def swin_outputs(encoder: Any) -> list[nn.Module]:
    """Blocks, but patch merging in place of the last block before it: its output is what the next block reads."""
    found: list[nn.Module] = []
    for i, stage in enumerate(encoder.layers):
        if i:
            found[-1] = stage.downsample
        found += stage.blocks
    return found


def text_folder(model_type: str, **changes: Any) -> Callable[[Path], Path]:
    """Makes a tiny text encoder of a transformers model type."""
    return lambda folder: bert_folder(folder, model_type=model_type, **changes)


def bert_layers(encoder: Any) -> list[nn.Module]:
    """Layers of an encoder built like BERT."""
    return list(encoder.encoder.layer)


def class_token(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The class token of transformers' own forward pass."""
    return encoder(**inputs).last_hidden_state[:, 0]


def sound_folder(kind: str) -> Callable[[Path], Path]:
    """Makes a tiny audio encoder of a kind that :mod:`tests.media` knows."""
    return lambda folder: audio_folder(folder, kind)


def clip_folder(kind: str) -> Callable[[Path], Path]:
    """Makes a tiny video encoder of a kind that :mod:`tests.media` knows."""
    return lambda folder: video_folder(folder, kind)


def wave_layers(encoder: Any) -> list[nn.Module]:
    """Layers of a wav2vec 2.0 or HuBERT."""
    return list(encoder.encoder.layers)


def wave_mean(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The mean of the frames that the library itself says are real, of its own forward pass."""
    mask = inputs.get("audio_mask")
    states = encoder(inputs["audio_values"], attention_mask=mask).last_hidden_state
    if mask is None:
        return states.mean(dim=1)
    real = encoder._get_feature_vector_attention_mask(states.shape[1], mask)
    return torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, real, strict=True)])


def mean_pooled(name: str) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """The mean of the last states of transformers' own forward pass on one input."""
    return lambda encoder, inputs: encoder(inputs[name]).last_hidden_state.mean(dim=1)


def before_the_classifier(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a fine-tuned VideoMAE gives to its classifier, which is gone."""
    return encoder(inputs["video_values"]).logits
