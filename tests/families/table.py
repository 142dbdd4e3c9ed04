"""One row per encoder family: a tiny encoder of it, what the library itself computes, and what is promised of it.

``test_family.py`` holds every row to the same tests, and ``docs/encoders.md`` is written from the rows. A new family
is a row here, besides its file and its line in ``mope_deploy/model/backbones/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.families.oracles.bert import BertOracle
from tests.families.oracles.deberta import DebertaOracle
from tests.families.oracles.distilbert import DistilBertOracle
from tests.families.oracles.modernbert import ModernBertOracle
from tests.families.oracles.mpnet import MPNetOracle
from tests.families.oracles.vit import ViTOracle
from tests.tiny import bert_folder, vit_folder

__all__ = ["FAMILIES", "GRAPHS", "MAIN", "PRECISIONS", "PREFIX_FORM", "Family", "by_name", "partner"]

Array = NDArray[Any]

# What TensorRT-RTX builds of every row's graph in these tests.
PRECISIONS = ("fp32",)
# Rows with a prefix form (keys and values of prompts as constants) besides the token form.
PREFIX_FORM: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    Attributes:
        name: the row's key, and its name on the page.
        covers: which encoders it stands for, for the page.
        modality: ``"image"`` or ``"text"``.
        make: writes a tiny encoder with scattered random weights into a folder that does not exist yet.
        layers: how many layers of it are prompted.
        outputs: the library's own modules whose outputs are x after each layer, in order. They are hooked during the
            library's own forward pass and compared with the backbone's states, layer by layer.
        pooled: the library's own pooled feature (B, D_y) of a batch of inputs.
        oracle: an independent float64 implementation, see :mod:`tests.families.oracles`; None for encoders that are
            never run layer by layer.
        main: whether it can be the main encoder.
        graphs: routing kinds it is exported with as the main encoder; ``"dense"``, ``"top2"``.
        fused: whether ONNX Runtime's attention fusion knows its attention.
        longest: tokens of the longest text of the tiny encoder; 0 for other modalities.
        tolerance: allowed max|a − b| / max|b| in float64; more only where the library itself computes in float32.
    """

    name: str
    covers: str
    modality: str
    make: Callable[[Path], Path]
    layers: int
    outputs: Callable[[Any], list[nn.Module]]
    pooled: Callable[[Any, Mapping[str, Tensor]], Tensor]
    oracle: Callable[[Mapping[str, NDArray[np.float64]], Any], Any] | None
    main: bool = True
    graphs: tuple[str, ...] = ("dense", "top2")
    fused: bool = True
    longest: int = 0
    tolerance: float = 1e-11


def timm_pooled(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """timm's own forward pass without a classifier."""
    return encoder(inputs["pixel_values"])


def blocks(encoder: Any) -> list[nn.Module]:
    """Layers of a plain timm transformer."""
    return list(encoder.blocks)


def text_folder(model_type: str, **changes: Any) -> Callable[[Path], Path]:
    """Makes a tiny text encoder of a transformers model type."""
    return lambda folder: bert_folder(folder, model_type=model_type, **changes)


def bert_layers(encoder: Any) -> list[nn.Module]:
    """Layers of an encoder built like BERT."""
    return list(encoder.encoder.layer)


def class_token(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The class token of transformers' own forward pass."""
    return encoder(**inputs).last_hidden_state[:, 0]


FAMILIES = (
    Family(
        name="ViT",
        covers="timm ViT",
        modality="image",
        make=vit_folder,
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=ViTOracle,
    ),
    Family(
        name="BERT",
        covers="transformers BERT, MiniLM",
        modality="text",
        make=bert_folder,
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=BertOracle,
        longest=40,
    ),
    Family(
        name="RoBERTa",
        covers="transformers RoBERTa, XLM-R, CamemBERT",
        modality="text",
        make=text_folder("roberta", pad_token_id=1),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=BertOracle,
        graphs=("dense",),
        longest=38,
    ),
    Family(
        name="ELECTRA",
        covers="transformers ELECTRA (discriminator)",
        modality="text",
        make=text_folder("electra"),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=BertOracle,
        graphs=("dense",),
        longest=40,
    ),
    Family(
        name="DistilBERT",
        covers="transformers DistilBERT",
        modality="text",
        make=text_folder("distilbert", hidden_dim=24),
        layers=2,
        outputs=lambda encoder: list(encoder.transformer.layer),
        pooled=class_token,
        oracle=DistilBertOracle,
        graphs=("dense",),
        longest=40,
    ),
    Family(
        name="MPNet",
        covers="transformers MPNet",
        modality="text",
        make=text_folder("mpnet", pad_token_id=1),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=MPNetOracle,
        fused=False,
        longest=38,
    ),
    Family(
        name="DeBERTa-v3",
        covers="transformers DeBERTa-v3",
        modality="text",
        # Heads of 12 features: the scale sqrt(3 · 12) is exact in the library's float32 too. 4 buckets: a text of
        # 5 tokens reaches logarithmic ones.
        make=text_folder(
            "deberta-v2",
            hidden_size=24,
            relative_attention=True,
            position_buckets=4,
            pos_att_type="p2c|c2p",
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        ),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=DebertaOracle,
        fused=False,
        longest=40,
    ),
    Family(
        name="DeBERTa-v2",
        covers="transformers DeBERTa-v2, with the convolution of its larger sizes",
        modality="text",
        make=text_folder(
            "deberta-v2",
            hidden_size=24,
            relative_attention=True,
            max_relative_positions=3,  # less than the texts are long, so that distances are clipped
            pos_att_type="c2p|p2c",
            type_vocab_size=2,
            conv_kernel_size=3,
        ),
        layers=2,
        outputs=lambda encoder: [encoder.encoder.conv, *encoder.encoder.layer[1:]],
        pooled=class_token,
        oracle=DebertaOracle,
        graphs=("dense",),
        fused=False,
        longest=40,
    ),
    Family(
        name="ModernBERT",
        covers="transformers ModernBERT",
        modality="text",
        # Windows of 2 tokens to either side: shorter than the texts. Layers 0 and 2 are global.
        make=text_folder(
            "modernbert",
            num_hidden_layers=3,
            local_attention=4,
            global_attn_every_n_layers=2,
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=None,
            sep_token_id=None,
        ),
        layers=3,
        outputs=lambda encoder: list(encoder.layers),
        pooled=class_token,
        oracle=ModernBertOracle,
        fused=False,
        longest=40,
        tolerance=1e-5,  # the library turns queries and keys in float32
    ),
)

MAIN = tuple(family for family in FAMILIES if family.main)


def by_name(name: str) -> Family:
    """The row called ``name``."""
    return next(family for family in FAMILIES if family.name == name)


def partner(family: Family) -> Family:
    """The plain encoder of the other modality that a row is tested with."""
    return by_name("BERT" if family.modality == "image" else "ViT")


def _graphs() -> tuple[tuple[str, str, str], ...]:
    """(main, complementary, routing) of every graph that is exported: each row in each of its roles, no pair twice.

    Rows of two modalities share their graphs: the dense one has the plain partner, in the other one rows take turns.
    """
    found = []
    for modality in ("image", "text"):
        others = [family for family in FAMILIES if family.modality != modality]
        for i, family in enumerate(row for row in MAIN if row.modality == modality):
            for kind in family.graphs:
                other = partner(family) if kind == "dense" else others[i % len(others)]
                found.append((family.name, other.name, kind))
    for family in FAMILIES:
        if all(family.name != complementary for _, complementary, _ in found):
            found.append((partner(family).name, family.name, "dense"))
    return tuple(found)


GRAPHS = _graphs()
