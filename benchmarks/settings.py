"""What the suite is asked for: how to measure, encoders of which size, and which graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["FORMS", "SIZES", "TEXT_LENGTH", "Settings", "Size", "Spec"]

TEXT_LENGTH = 32  # tokens, as the targets say
FORMS: tuple[Literal["prefix", "token"], ...] = ("token", "prefix")


@dataclass(frozen=True)
class Size:
    """Two image encoders and a text encoder."""

    vit: Mapping[str, Any]  # arguments of timm's architecture, and swin's of its own
    swin: Mapping[str, Any]
    bert: Mapping[str, int]  # values of transformers' configuration
    names: Mapping[str, str]  # what these encoders are called, by kind
    image: int = 224  # height and width in pixels


def _bert(width: int, layers: int, heads: int, words: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": width * 4,
        "vocab_size": words,
    }


SIZES = {
    "tiny": Size(
        vit={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32},
        swin={"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32},
        bert=_bert(32, layers=1, heads=2, words=100),
        image=32,
        names={"vit": "ViT of 1×32", "swin": "Swin of 2×16", "text": "BERT of 1×32"},
    ),
    "small": Size(
        vit={"embed_dim": 384, "depth": 2, "num_heads": 6},
        swin={"embed_dim": 96, "depths": (1, 1, 2, 1), "num_heads": (3, 6, 12, 24), "window_size": 7},
        bert=_bert(384, layers=2, heads=6, words=1000),
        names={"vit": "ViT-S/16 of 2 layers", "swin": "Swin-T of 5 layers", "text": "BERT of 2×384"},
    ),
    "base": Size(
        vit={},
        swin={},
        bert=_bert(768, layers=12, heads=12, words=30_522),
        names={"vit": "ViT-B/16", "swin": "Swin-B", "text": "BERT-base"},
    ),
}


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    folder: Path  # where graphs go
    size: str = "base"  # key of SIZES; the targets are about base
    form: str = "prefix"  # one of FORMS, of the exported model
    threads: int = 2  # of ONNX Runtime and of PyTorch
    seconds: float = 60.0  # of each comparison
    rounds: int = 20  # of each comparison, at least
    few: bool = False  # fewer points of each curve, and no static int8, which takes minutes to calibrate
    processes: int = 11  # how often a process is started where that is what is measured
    bundle: Path | None = None  # for device-process; None for one of digits-ve's encoders with random prompts

    @property
    def encoders(self) -> Size:
        """The encoders of :attr:`size`."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Spec:
    """One graph, or the eager module that it is exported from.

    Its kind is ``mope``; ``bare``, both encoders without prompts and a linear head; ``bare-main``, the main encoder
    alone and its head; or ``given-y``, the main file of a MoPE in parts (``mope-export --split``), which is given y and
    all that depends on y alone.
    """

    kind: str = "mope"
    image: str = "vit"  # or swin
    main: str = "image"  # or text: the modality that is prompted
    experts: int = 16
    top_k: int = 0
    prompt_length: int = 6
    precision: str = "fp32"  # or int8-dynamic, or int8
    eager: bool = False  # the module, in PyTorch

    @property
    def name(self) -> str:
        """For files and tables."""
        parts = [self.kind, f"{self.image}-main" if self.main == "image" else f"text-main-{self.image}"]
        if self.kind in ("mope", "given-y"):
            parts.append(f"K{self.experts}-L{self.prompt_length}-{f'top{self.top_k}' if self.top_k else 'soft'}")
        return "-".join([*parts, self.precision])

    @property
    def complementary(self) -> str:
        """The modality that is not the main one."""
        return "text" if self.main == "image" else "image"
