"""Frozen encoders: loading one from a source, and the one table that decides its family.

A family is one file that wraps a library's encoder into the interface of :class:`Backbone`; only these files know timm
or transformers. Adding a family is that file and one line in ``_families``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone
from mope_deploy.model.backbones.sources import LoadedEncoder, load_source
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import ImageSpec, TextSpec

__all__ = ["Backbone", "FrozenEncoder", "load_encoder"]


@dataclass(frozen=True)
class FrozenEncoder:
    """A wrapped encoder together with what its raw inputs must become.

    Attributes:
        backbone: the encoder behind the common interface, its parameters frozen.
        preprocess: how raw samples of its modality become its inputs.
        tokenizer: the JSON text of a ``tokenizer.json`` for a text encoder, else None.
    """

    backbone: Backbone
    preprocess: ImageSpec | TextSpec
    tokenizer: str | None = None


def load_encoder(spec: EncoderSpec, *, main: bool = False) -> FrozenEncoder:
    """Load, wrap and freeze the encoder that ``spec`` names.

    Args:
        spec: the encoder.
        main: whether it is to be the main encoder, whose layers are prompted.

    Raises:
        ConfigError: if the source does not exist, is no supported encoder, is of another modality than ``spec`` says,
            or has no layers to prompt where prompts are wanted.
    """
    # Libraries draw initial values before they load weights; the caller's random state is not theirs to move.
    with torch.random.fork_rng(devices=[]):
        loaded = load_source(spec.source)
    for family in _families():
        if family.accepts(loaded.module):
            if family.modality != spec.modality:
                raise ConfigError(
                    f"{spec.source} is an encoder of another modality",
                    received=f"modality {spec.modality!r}",
                    expected=repr(family.modality),
                )
            if not family.main and (main or spec.prompts):
                raise ConfigError(
                    f"{spec.source} has no layers to prompt, so it can be a complementary encoder only, with prompts=0",
                    received=type(loaded.module).__name__,
                    expected=" or ".join(family.name for family in _families() if family.main),
                )
            frozen = family.wrap(loaded, spec)
            frozen.backbone.requires_grad_(False).eval()
            return frozen
    raise ConfigError(
        f"{spec.source} belongs to no supported encoder family",
        received=type(loaded.module).__name__,
        expected=" or ".join(family.name for family in _families()),
    )


@dataclass(frozen=True)
class _Family:
    name: str
    modality: str
    accepts: Callable[[nn.Module], bool]
    wrap: Callable[[LoadedEncoder, EncoderSpec], Any]
    main: bool = True


def _families() -> tuple[_Family, ...]:
    # Imported here: each family imports its library, and a text-only user should not wait for timm.
    from mope_deploy.model.backbones import (
        beit,
        bert,
        deberta,
        eva,
        modernbert,
        mpnet,
        pooled,
        pooled_text,
        pooled_vision,
        swin,
        vit,
    )

    return (
        _Family("timm VisionTransformer", "image", vit.accepts, vit.wrap),
        _Family("timm Eva", "image", eva.accepts, eva.wrap),
        _Family("timm Beit", "image", beit.accepts, beit.wrap),
        _Family("timm SwinTransformer", "image", swin.accepts, swin.wrap),
        _Family("transformers BERT-like", "text", bert.accepts, bert.wrap),
        _Family("transformers DeBERTa-v2", "text", deberta.accepts, deberta.wrap),
        _Family("transformers ModernBERT", "text", modernbert.accepts, modernbert.wrap),
        _Family("transformers MPNet", "text", mpnet.accepts, mpnet.wrap),
        # Last: they take whatever no family before them runs layer by layer.
        _Family("another timm image encoder", "image", pooled.accepts, pooled.wrap, main=False),
        _Family("another transformers image encoder", "image", pooled_vision.accepts, pooled_vision.wrap, main=False),
        _Family("another transformers text encoder", "text", pooled_text.accepts, pooled_text.wrap, main=False),
    )
