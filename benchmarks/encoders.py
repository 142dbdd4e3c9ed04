"""Encoders of real sizes with random weights: no downloads, and speed does not depend on the values."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from benchmarks.settings import Size, Spec
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig
from mope_deploy.model.backbones import FrozenEncoder
from mope_deploy.model.backbones.families import families
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.build import assemble

__all__ = ["LABELS", "BareEncoder", "BarePair", "Encoders"]

LABELS = ("entailment", "neutral", "contradiction")
_ARCHITECTURES = {"vit": "vit_base_patch16_224", "swin": "swin_base_patch4_window7_224"}
_POSITIONS = 512


class Encoders:
    """The frozen encoders of one size, each built when it is first asked for and shared from then on."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._images: dict[str, FrozenEncoder] = {}

    def image(self, kind: str) -> FrozenEncoder:
        """A ``"vit"`` or a ``"swin"``."""
        if kind not in self._images:
            args = dict(self.size.vit if kind == "vit" else self.size.swin)
            torch.manual_seed(0)
            module = timm.create_model(_ARCHITECTURES[kind], num_classes=0, **args)
            self._images[kind] = _frozen(LoadedEncoder(module, _ARCHITECTURES[kind], args))
        return self._images[kind]

    @cached_property
    def text(self) -> FrozenEncoder:
        """A BERT with a tokenizer of as many words as it has embeddings."""
        torch.manual_seed(1)
        config = AutoConfig.for_model("bert", max_position_embeddings=_POSITIONS, **self.size.bert)
        module = AutoModel.from_config(config, add_pooling_layer=False)
        with tempfile.TemporaryDirectory(prefix="mope-benchmarks-") as folder:
            _tokenizer(self.size.bert["vocab_size"]).save(str(Path(folder, "tokenizer.json")))
            return _frozen(LoadedEncoder(module, folder))

    def mope(self, spec: Spec = Spec()) -> MoPE:
        """The MoPE of ``spec`` over both, freshly initialised."""
        config = MoPEConfig(
            main=_spec(spec.main),
            complementary=(_spec(spec.complementary, prompts=4 if spec.complementary == "text" else 0),),
            labels=LABELS,
            experts=spec.experts,
            top_k=spec.top_k,
            prompt_length=spec.prompt_length,
        )
        return assemble(MoPE, config, {"image": self.image(spec.image), "text": self.text})


class BareEncoder(nn.Module):
    """One encoder as its library runs it, without any prompt: the baseline of every ratio.

    Called by the modules' own ``forward``, not through the interface that MoPE prompts them by, so that a cost of that
    interface would show. Names of modules are those of a MoPE, which quantisation finds its layers by.
    """

    def __init__(self, frozen: FrozenEncoder) -> None:
        super().__init__()
        self.encoder: Any = frozen.backbone.encoder
        self.modality = frozen.backbone.modality
        self.feature_width = frozen.backbone.feature_width

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs by name → pooled feature (B, width)."""
        if self.modality == "image":
            return self.encoder(inputs["pixel_values"])
        mask = inputs["attention_mask"][:, None, None, :]
        # Additive and made once: from a mask of integers the exporter makes a slower graph.
        blocked = (1.0 - mask.to(torch.float32)) * torch.finfo(torch.float32).min
        return self.encoder(input_ids=inputs["input_ids"], attention_mask=blocked).last_hidden_state[:, 0]


class BarePair(nn.Module):
    """Bare encoders and one linear head on their features: the one that a MoPE prompts, and the other one if any."""

    def __init__(self, main: FrozenEncoder, complementary: FrozenEncoder | None = None) -> None:
        super().__init__()
        self.main = BareEncoder(main)
        self.complementary = nn.ModuleDict()
        width = self.main.feature_width
        if complementary is not None:
            other = BareEncoder(complementary)
            self.complementary[other.modality] = nn.ModuleDict({"backbone": other})
            width += other.feature_width
        self.head = nn.Linear(width, len(LABELS))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor]:
        """Inputs by name → ``logits`` (B, C), in a tuple as graphs return them."""
        features = [self.main(inputs)]
        features += [holder["backbone"](inputs) for holder in self.complementary.values()]  # type: ignore[index]
        return (self.head(torch.cat(features, dim=-1)),)


def _spec(modality: str, *, prompts: int = 0) -> EncoderSpec:
    length = _POSITIONS if modality == "text" else None
    return EncoderSpec(modality=modality, source="embedded:random", prompts=prompts, max_length=length)


def _frozen(loaded: LoadedEncoder) -> FrozenEncoder:
    family = next(family for family in families() if family.accepts(loaded.module))
    frozen = family.wrap(loaded, _spec(family.modality))
    frozen.backbone.requires_grad_(False).eval()
    return frozen


def _tokenizer(words: int) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
