"""Models from a configuration: frozen encoders, and freshly initialised prompts around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from mope_deploy.model.backbones import FrozenEncoder, load_encoder
from mope_deploy.model.complementary import ComplementaryEncoder
from mope_deploy.model.config import EncoderSpec, MoPEConfig
from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.heads import ClassificationHead
from mope_deploy.model.mapper import Mapper
from mope_deploy.model.mope import MoPE
from mope_deploy.model.prompts import LayerPrompts, StaticPrompt
from mope_deploy.model.randomness import forked
from mope_deploy.model.router import Router, routing_embeddings
from mope_deploy.preprocess import Preprocessing

__all__ = ["assemble", "load_encoders"]

M = TypeVar("M", bound=MoPE)


def load_encoders(config: MoPEConfig) -> dict[str, FrozenEncoder]:
    """The frozen encoders that ``config`` names, by modality.

    Raises:
        ConfigError: if one cannot be loaded or is of the wrong kind.
    """
    return {spec.modality: load_encoder(spec, main=spec is config.main) for spec in config.encoders}


def assemble(
    kind: type[M],
    config: MoPEConfig,
    encoders: Mapping[str, FrozenEncoder],
    *,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> M:
    """A model of class ``kind`` on loaded encoders, in evaluation mode.

    Args:
        kind: the class to make: the plain module, or the one that also knows disk and hub.
        config: what to build.
        encoders: the loaded encoders by modality.
        seed: of the initial values; every random state, GPUs' too, is left as it was. One thread builds at a time.
        preprocessing: what a checkpoint recorded; default: the encoders' own.

    Raises:
        ConfigError: if ``config`` names fewer labels than its task needs.
    """
    config.check_labels()
    with forked():
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where all of it is drawn
        main = encoders[config.main.modality].backbone
        complementary = {spec.modality: _complementary(config, spec, encoders) for spec in config.complementary}
        widths_y = {name: encoder.backbone.feature_width for name, encoder in complementary.items()}
        shared = {} if config.mapper_per_layer else _mappers(config, main.widths, widths_y)
        model = kind(
            config=config,
            main=main,
            complementary=complementary,
            layers=[_layer(config, i, width, widths_y) for i, width in enumerate(main.widths)],
            mappers=shared,
            head=ClassificationHead(width=main.feature_width, classes=len(config.labels)),
            preprocessing=preprocessing or _preprocessing(config, encoders),
        )
        _initialise_prompts(model)
    return model.eval()


def _complementary(
    config: MoPEConfig, spec: EncoderSpec, encoders: Mapping[str, FrozenEncoder]
) -> ComplementaryEncoder:
    backbone = encoders[spec.modality].backbone
    prompts = [StaticPrompt(prompt_length=spec.prompts, width=width) for width in backbone.widths]
    return ComplementaryEncoder(
        backbone,
        prompts=prompts if spec.prompts else [],
        dropout=config.prompt_dropout,
        standardise=config.y_norm == "standardise",
    )


def _layer(config: MoPEConfig, index: int, width: int, widths_y: Mapping[str, int]) -> LayerPrompts:
    router = experts = None
    if config.dynamic:
        U = routing_embeddings(
            experts=config.experts,
            width=config.d_x + config.d_y * len(widths_y),
            seed=config.routing_seed,
            layer=index,
        )
        router = Router(
            width_x=width,
            widths_y=widths_y,
            embeddings=U,
            d_x=config.d_x,
            d_y=config.d_y,
            temperature=config.temperature,
            sigma=config.sigma,
            top_k=config.top_k,
            cosine=config.similarity == "cosine",
            train_embeddings=config.train_embeddings,
        )
        experts = PromptExperts(experts=config.experts, prompt_length=config.prompt_length, width=width)
    return LayerPrompts(
        static=StaticPrompt(prompt_length=config.prompt_length, width=width) if config.static else None,
        experts=experts,
        router=router,
        mappers=_mappers(config, (width,), widths_y) if config.mapper_per_layer else {},
        dropout=config.prompt_dropout,
    )


def _mappers(config: MoPEConfig, widths: tuple[int, ...], widths_y: Mapping[str, int]) -> dict[str, Mapper]:
    if not config.mapped:
        return {}
    return {
        name: Mapper(width_y=width_y, bottleneck=config.mapper_width or max(1, width_y // 2), widths=widths)
        for name, width_y in widths_y.items()
    }


def _initialise_prompts(model: MoPE) -> None:
    """Initial values of static prompts and experts; linear layers keep PyTorch's own."""
    scale = model.config.prompt_init_scale
    for module in model.modules():
        if isinstance(module, StaticPrompt | PromptExperts):
            tokens = module.tokens if isinstance(module, StaticPrompt) else module.prompts
            if model.config.prompt_init == "normal":
                nn.init.normal_(tokens, std=scale)
            else:
                nn.init.uniform_(tokens, -scale, scale)
    # As large as features are. Of zeros, a router that compares directions would have a gradient of 1e10; and all
    # experts would score the same. Last, so that nothing else of a model depends on what may be missing.
    for stand_in in model.stand_ins.values():
        nn.init.normal_(stand_in)


def _preprocessing(config: MoPEConfig, encoders: Mapping[str, FrozenEncoder]) -> Preprocessing:
    specs = {"image": None, "text": None} | {name: encoder.preprocess for name, encoder in encoders.items()}
    tokenizer = encoders["text"].tokenizer if "text" in encoders else None
    return Preprocessing(**specs, tokenizer=tokenizer, missing=config.missing)  # type: ignore[arg-type]
