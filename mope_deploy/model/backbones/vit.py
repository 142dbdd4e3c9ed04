"""timm's VisionTransformer (ViT, DeiT and relatives with learned positions), pre-norm, prompts behind the patches.

Prompts are appended after the position embeddings were added, so they have no position, and behind the image tokens, so
class and register tokens keep their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import ImageSpec

__all__ = ["ViTBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return isinstance(module, VisionTransformer)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing, which is timm's evaluation transform.

    Raises:
        ConfigError: for an encoder without a pooled feature (``global_pool=''``).
    """
    from mope_deploy.model.backbones import FrozenEncoder

    assert isinstance(loaded.module, VisionTransformer)
    if loaded.module.global_pool == "":
        raise ConfigError(f"{spec.source} does not pool", received="global_pool=''", expected="token, avg or map")
    return FrozenEncoder(
        ViTBackbone(loaded.module, model_args=loaded.model_args),
        ImageSpec.from_timm(_data_config(loaded.module)),
    )


def _data_config(encoder: VisionTransformer) -> dict[str, Any]:
    """timm's evaluation transform, at the size the encoder was built for: ``img_size`` may override its tag's."""
    height, width = encoder.patch_embed.img_size
    return resolve_data_config({"input_size": (3, height, width)}, model=encoder)


class ViTBackbone(Backbone):
    """A timm VisionTransformer, layer by layer.

    Args:
        encoder: timm's module, without a classifier.
        model_args: what was passed to timm besides the architecture's name; the module itself does not remember it.
    """

    modality = "image"
    input_names = ("pixel_values",)

    def __init__(self, encoder: VisionTransformer, *, model_args: Mapping[str, Any]) -> None:
        super().__init__(
            encoder, width=encoder.embed_dim, depth=len(encoder.blocks), feature_width=encoder.num_features
        )
        self.model_args = dict(model_args)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Class token and patches with positions. pixel_values (B, 3, H, W) → (B, N, D); all tokens are real."""
        x = self.encoder.patch_embed(inputs["pixel_values"])
        x = self.encoder._pos_embed(x)
        x = self.encoder.patch_drop(x)
        return self.encoder.norm_pre(x), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Block ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        block = self.encoder.blocks[index]
        if prompts is None:
            return block(x)
        N = x.shape[1]
        return block(torch.cat([x, prompts], dim=1))[:, :N]

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token, or the mean of the patches where there is none. (B, N, D) → (B, D)."""
        if self.encoder.has_class_token:
            return x[:, 0]
        return x[:, self.encoder.num_prefix_tokens :].mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)

    def save_source(self, folder: Path) -> None:
        """Write config.json and model.safetensors in the form that timm's ``local-dir:`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        cfg = dict(self.encoder.pretrained_cfg)
        kept = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        config = {
            "architecture": cfg["architecture"],
            "num_classes": 0,
            "num_features": self.feature_width,
            "global_pool": self.encoder.global_pool,
            "model_args": self.model_args,
            "pretrained_cfg": {key: cfg[key] for key in kept if key in cfg} | {"num_classes": 0},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.encoder.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(tensors))
