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
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from tests.families.oracles.beit import BeitOracle
from tests.families.oracles.bert import BertOracle
from tests.families.oracles.deberta import DebertaOracle
from tests.families.oracles.distilbert import DistilBertOracle
from tests.families.oracles.eva import EvaOracle
from tests.families.oracles.media import VideoMAEOracle, Wav2Vec2Oracle, WhisperOracle
from tests.families.oracles.modernbert import ModernBertOracle
from tests.families.oracles.mpnet import MPNetOracle
from tests.families.oracles.swin import SwinOracle
from tests.families.oracles.vit import ViTOracle
from tests.media import audio_folder, video_folder
from tests.tiny import bert_folder, scatter_weights, timm_folder, vit_folder

__all__ = ["FAMILIES", "FUSED_GRAPHS", "GRAPHS", "MAIN", "PRECISIONS", "PREFIX_FORM", "Family", "by_name", "partner"]

Array = NDArray[Any]

# What TensorRT-RTX builds of every row's graph in these tests.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# Rows with a prefix form (prompts as keys and values alone) besides the token form.
PREFIX_FORM: tuple[str, ...] = (
    "ViT",
    "DeiT",
    "DINOv2",
    "SigLIP",
    "EVA02",
    "DINOv3",
    "RoPE-ViT",
    "BEiT",
    "Swin",
    "BERT",
    "RoBERTa",
    "ELECTRA",
    "DistilBERT",
    "MPNet",
    "ModernBERT",
    "wav2vec 2.0",
    "HuBERT",
    "wav2vec 2.0 base",
    "Whisper",
    "VideoMAE",
    "VideoMAE fine-tuned",
)


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
        main: whether it can be the main encoder.
        beside: the row that is the complementary encoder in the graph where this one is main; the rows between them
            need every row in each of its roles, and every fusable one beside a fusable one.
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
    beside: str | None = None
    fused: bool = True
    longest: int = 0
    tolerance: float = 1e-11


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
        name="DeiT",
        covers="timm DeiT, distilled",
        modality="image",
        beside="MPNet",
        make=image_folder("deit_tiny_distilled_patch16_224"),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=ViTOracle,
    ),
    Family(
        name="DINOv2",
        covers="timm DINOv2, with registers",
        modality="image",
        beside="DeBERTa-v3",
        make=image_folder("vit_small_patch14_reg4_dinov2", reg_tokens=2),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=ViTOracle,
    ),
    Family(
        name="SigLIP",
        covers="timm SigLIP's image tower",
        modality="image",
        beside="DeBERTa-v2",
        make=image_folder("vit_base_patch16_siglip_224"),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=ViTOracle,
    ),
    Family(
        name="EVA02",
        covers="timm EVA02",
        modality="image",
        beside="RoBERTa",
        make=image_folder("eva02_base_patch14_224"),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=EvaOracle,
        tolerance=1e-6,  # the library computes angles in float32
    ),
    Family(
        name="DINOv3",
        covers="timm DINOv3",
        modality="image",
        beside="ELECTRA",
        make=image_folder("vit_small_patch16_dinov3", num_reg_tokens=2),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=EvaOracle,
        tolerance=1e-6,
    ),
    Family(
        name="RoPE-ViT",
        covers="timm RoPE-ViT, mixed frequencies",
        modality="image",
        beside="DistilBERT",
        make=image_folder("vit_small_patch16_rope_mixed_224"),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=EvaOracle,
        tolerance=1e-6,
    ),
    Family(
        name="BEiT",
        covers="timm BEiT, BEiT v2",
        modality="image",
        beside="ALBERT",
        make=image_folder("beit_base_patch16_224"),
        layers=2,
        outputs=blocks,
        pooled=timm_pooled,
        oracle=BeitOracle,
    ),
    Family(
        name="Swin",
        covers="timm Swin Transformer v1",
        modality="image",
        beside="ModernBERT",
        # 8×6 patches in windows of 3×3, so that windows hang over the edge; the second stage has 4×3 tokens.
        make=timm_pooled_folder(
            "swin_tiny_patch4_window7_224",
            img_size=(32, 24),
            patch_size=4,
            window_size=3,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            mlp_ratio=2,
        ),
        layers=4,
        outputs=swin_outputs,
        pooled=timm_pooled,
        oracle=SwinOracle,
        fused=False,
    ),
    Family(
        name="ConvNeXt",
        covers="any other timm image encoder: ConvNeXt",
        modality="image",
        make=timm_pooled_folder("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        layers=0,
        outputs=lambda encoder: [],
        pooled=timm_pooled,
        oracle=None,
        main=False,
    ),
    Family(
        name="ResNet",
        covers="timm ResNet and other convolutional ones",
        modality="image",
        make=timm_pooled_folder("resnet10t", channels=(8, 8, 16, 32)),
        layers=0,
        outputs=lambda encoder: [],
        pooled=timm_pooled,
        oracle=None,
        main=False,
    ),
    Family(
        name="ResNet (transformers)",
        covers="any other transformers image encoder: ResNet, ConvNeXt, ViT, DINOv2, Swin",
        modality="image",
        make=vision_folder,
        layers=0,
        outputs=lambda encoder: [],
        pooled=lambda encoder, inputs: encoder(**inputs).pooler_output.flatten(1),
        oracle=None,
        main=False,
    ),
    Family(
        name="BERT",
        covers="transformers BERT, MiniLM",
        modality="text",
        beside="DeiT",
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
        beside="DINOv2",
        make=text_folder("roberta", pad_token_id=1),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=BertOracle,
        longest=38,
    ),
    Family(
        name="ELECTRA",
        covers="transformers ELECTRA (discriminator)",
        modality="text",
        beside="SigLIP",
        make=text_folder("electra"),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=BertOracle,
        longest=40,
    ),
    Family(
        name="DistilBERT",
        covers="transformers DistilBERT",
        modality="text",
        beside="ConvNeXt",
        make=text_folder("distilbert", hidden_dim=24),
        layers=2,
        outputs=lambda encoder: list(encoder.transformer.layer),
        pooled=class_token,
        oracle=DistilBertOracle,
        longest=40,
    ),
    Family(
        name="MPNet",
        covers="transformers MPNet",
        modality="text",
        beside="EVA02",
        make=text_folder("mpnet", pad_token_id=1),
        layers=2,
        outputs=bert_layers,
        pooled=class_token,
        oracle=MPNetOracle,
        longest=38,
    ),
    Family(
        name="DeBERTa-v3",
        covers="transformers DeBERTa-v3",
        modality="text",
        beside="DINOv3",
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
        beside="RoPE-ViT",
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
        fused=False,
        longest=40,
    ),
    Family(
        name="ModernBERT",
        covers="transformers ModernBERT",
        modality="text",
        beside="BEiT",
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
        longest=40,
        tolerance=1e-5,  # the library turns queries and keys in float32
    ),
    Family(
        name="ALBERT",
        covers="any other transformers text encoder that leaves padding out: ALBERT, DeBERTa-v1",
        modality="text",
        make=text_folder("albert", embedding_size=8),
        layers=0,
        outputs=lambda encoder: [],
        pooled=class_token,
        oracle=None,
        main=False,
        longest=40,
    ),
)


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


FAMILIES += (
    Family(
        name="wav2vec 2.0",
        beside="VideoMAE",
        covers="transformers wav2vec 2.0 with layer norm, clips of any length",
        modality="audio",
        make=sound_folder("wav2vec2"),
        layers=2,
        outputs=wave_layers,
        pooled=wave_mean,
        oracle=Wav2Vec2Oracle,
    ),
    Family(
        name="HuBERT",
        beside="VideoMAE fine-tuned",
        covers="transformers HuBERT with layer norm, clips of any length; post-norm layers",
        modality="audio",
        make=sound_folder("hubert-post-norm"),
        layers=2,
        outputs=wave_layers,
        pooled=wave_mean,
        oracle=Wav2Vec2Oracle,
    ),
    Family(
        name="wav2vec 2.0 base",
        beside="ViT",
        covers="transformers wav2vec 2.0 and HuBERT with group norm, clips of one fixed length",
        modality="audio",
        make=sound_folder("wav2vec2-group"),
        layers=2,
        outputs=wave_layers,
        pooled=wave_mean,
        oracle=Wav2Vec2Oracle,
    ),
    Family(
        name="Whisper",
        covers="transformers Whisper, its encoder",
        modality="audio",
        make=sound_folder("whisper"),
        layers=2,
        outputs=lambda encoder: list(encoder.layers),
        pooled=mean_pooled("audio_features"),
        oracle=WhisperOracle,
    ),
    Family(
        name="VideoMAE",
        beside="wav2vec 2.0",
        covers="transformers VideoMAE",
        modality="video",
        make=clip_folder("videomae"),
        layers=2,
        outputs=lambda encoder: list(encoder.encoder.layer),
        pooled=mean_pooled("video_values"),
        oracle=VideoMAEOracle,
    ),
    Family(
        name="VideoMAE fine-tuned",
        beside="HuBERT",
        covers="transformers VideoMAE for classification, with the norm behind the mean",
        modality="video",
        make=clip_folder("videomae-fine-tuned"),
        layers=2,
        outputs=lambda encoder: list(encoder.videomae.encoder.layer),
        pooled=before_the_classifier,
        oracle=VideoMAEOracle,
    ),
)

MAIN = tuple(family for family in FAMILIES if family.main)


def by_name(name: str) -> Family:
    """The row called ``name``."""
    return next(family for family in FAMILIES if family.name == name)


def partner(family: Family) -> Family:
    """The plain encoder of the other modality that a row is tested with."""
    return by_name("ViT" if family.modality == "text" else "BERT")


def _graphs() -> tuple[tuple[str, str], ...]:
    """(main, complementary) of every graph that is exported. Each costs seconds: there are no more than needed."""
    found = [(family.name, family.beside or partner(family).name) for family in MAIN]
    taken = {complementary for _, complementary in found}
    return (*found, *((partner(family).name, family.name) for family in FAMILIES if family.name not in taken))


def _fused_graphs() -> tuple[tuple[str, str], ...]:
    """Of those, some in which every row shows once whether it can be fused: that needs a partner that can."""
    found: list[tuple[str, str]] = []
    shown: set[str] = set()
    for names in GRAPHS:
        # A graph that fails to be fused tells of the row to blame alone.
        to_blame = {name for name in names if not by_name(name).fused}
        telling = to_blame or set(names)
        if telling - shown:
            found.append(names)
            shown |= telling
    return tuple(found)


GRAPHS = _graphs()
FUSED_GRAPHS = _fused_graphs()
