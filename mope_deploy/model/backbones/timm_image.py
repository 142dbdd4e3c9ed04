"""What timm's image encoders of every family share: their input, their preprocessing, and being written to a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.data import resolve_data_config
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Encoder, FrozenEncoder, LayeredEncoder
from mope_deploy.model.backbones.exported.separate import separate
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.prefix import PrefixKV, Projection
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import projection
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import ImageSpec

__all__ = ["LayeredTimm", "TimmEncoder"]

# Of timm's description of weights: its evaluation transform, and whether input_size is also the encoder's img_size.
_KEPT = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class TimmEncoder(Encoder):
    """An image encoder of timm's, its classifier dropped.

    Attributes:
        model_args: what was passed to timm besides the architecture's name; the module itself does not remember it.
    """

    modality = "image"
    input_names = ("pixel_values",)
    model_args: dict[str, Any]

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing, which is timm's evaluation transform.

        Raises:
            ConfigError: if it leaves its features unpooled (``global_pool=''``).
        """
        if getattr(loaded.module, "global_pool", None) == "":
            raise ConfigError(f"{spec.source} does not pool", received="global_pool=''", expected="token, avg or map")
        return FrozenEncoder(cls.of(loaded), ImageSpec.from_timm(_data_config(loaded.module)))

    @classmethod
    def of(cls, loaded: LoadedEncoder) -> Any:
        """The encoder alone."""
        backbone: Any = cls(loaded.module)  # type: ignore[call-arg]
        backbone.model_args = dict(loaded.model_args)
        return backbone

    def save_source(self, folder: Path) -> None:
        """Write config.json and model.safetensors in the form that timm's ``local-dir:`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        cfg = dict(self.encoder.pretrained_cfg)
        config = {
            "architecture": cfg["architecture"],
            "num_classes": 0,
            "num_features": self.feature_width,
            "global_pool": getattr(self.encoder, "global_pool", None),
            "model_args": self.model_args,
            "pretrained_cfg": {key: cfg[key] for key in _KEPT if key in cfg} | {"num_classes": 0},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.encoder.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(tensors))


class LayeredTimm(TimmEncoder, LayeredEncoder):
    """A transformer of timm's, block by block."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder, width=encoder.embed_dim, feature_width=encoder.head_hidden_size)

    @property
    def layers(self) -> Sequence[Any]:
        return self.encoder.blocks

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        """A pre-norm block with :meth:`attend` in place of its attention. (B, N, D), (B, P, D) → (B, N, D)."""
        normed = None if prompts is None else layer.norm1(prompts)
        mixed = traced_as(layer.attn, self.attend, layer, layer.norm1(x), normed, kv, shared)
        x = x + _scaled(layer, 1, mixed)
        return x + _scaled(layer, 2, layer.mlp(layer.norm2(x)))

    def attend(self, block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        """The block's attention of normed tokens to themselves and to prompts. (B, N, D), (B, P, D) → (B, N, D)."""
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def projection(self, index: int) -> Projection:
        return projection(self.layers[index])

    def separate(self, index: int) -> None:
        separate(self.layers[index].attn)

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The class token, or the mean of the patches where there is none. (B, N, D) → (B, D)."""
        if self.encoder.cls_token is not None:
            return x[:, 0]
        return x[:, self.encoder.num_prefix_tokens :].mean(dim=1)

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)


def _scaled(block: Any, which: int, x: Tensor) -> Tensor:
    """A branch's result with the block's learned scale, which timm keeps as a module or as a parameter."""
    if hasattr(block, f"ls{which}"):
        return getattr(block, f"ls{which}")(x)
    gamma = getattr(block, f"gamma_{which}", None)
    return x if gamma is None else gamma * x


def _data_config(encoder: nn.Module) -> dict[str, Any]:
    """timm's evaluation transform, at the size the encoder was built for: ``img_size`` may override its tag's."""
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    return resolve_data_config({"input_size": (3, *size)} if size else {}, model=encoder)
