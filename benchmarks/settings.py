"""What the suite is asked for, and the encoder sizes that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FORMS", "SIZES", "TEXT_LENGTH", "NotRun", "Settings", "Size"]

TEXT_LENGTH = 32  # tokens, as the targets say
FORMS = ("token", "prefix")


class NotRun(Exception):
    """Why a figure cannot be had here; it is reported, not an error."""


@dataclass(frozen=True)
class Size:
    """Two image encoders and a text encoder.

    Attributes:
        vit, swin: arguments of timm's architectures.
        bert: values of transformers' configuration.
        image: height and width in pixels.
        names: what these encoders are called, by kind.
    """

    vit: Mapping[str, Any]
    swin: Mapping[str, Any]
    bert: Mapping[str, int]
    image: int
    names: Mapping[str, str]


SIZES = {
    "tiny": Size(
        vit={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32},
        swin={"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32},
        bert={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 100,
        },
        image=32,
        names={"vit": "ViT of 1×32", "swin": "Swin of 2×16", "text": "BERT of 1×32"},
    ),
    "small": Size(
        vit={"embed_dim": 384, "depth": 2, "num_heads": 6},
        swin={"embed_dim": 96, "depths": (1, 1, 2, 1), "num_heads": (3, 6, 12, 24), "window_size": 7},
        bert={
            "hidden_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "vocab_size": 1000,
        },
        image=224,
        names={"vit": "ViT-S/16 of 2 layers", "swin": "Swin-T of 5 layers", "text": "BERT of 2×384"},
    ),
    "base": Size(
        vit={},
        swin={},
        bert={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "vocab_size": 30_522,
        },
        image=224,
        names={"vit": "ViT-B/16", "swin": "Swin-B", "text": "BERT-base"},
    ),
}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        size: key of :data:`SIZES`; the targets are about ``base``.
        form: ``"token"`` or ``"prefix"``, of the exported and the trained model.
        threads: of ONNX Runtime and of PyTorch.
        seconds: of each comparison.
        rounds: of each comparison, at least.
        few: fewer points of each curve, and no static int8, which takes minutes to calibrate.
        processes: how often a process is started where that is what is measured.
        bundle: for ``device-process``; None for one of digits-ve's encoders with random prompts.
        folder: where graphs go.
    """

    folder: Path = field(repr=False)
    size: str = "base"
    form: str = "prefix"
    threads: int = 2
    seconds: float = 60.0
    rounds: int = 20
    few: bool = False
    processes: int = 11
    bundle: Path | None = None

    @property
    def encoders(self) -> Size:
        """The encoders of :attr:`size`."""
        return SIZES[self.size]
