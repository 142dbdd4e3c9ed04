"""One row per encoder family: a tiny encoder of it, what the library itself computes, and what is promised of it.

``test_family.py`` holds every row to the same tests, and ``docs/encoders.md`` is written from the rows. A new family
is a row here, besides its file and its line in ``mope_deploy/model/backbones/``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
from tests.families.row import (
    Family,
    before_the_classifier,
    bert_layers,
    blocks,
    class_token,
    clip_folder,
    image_folder,
    mean_pooled,
    sound_folder,
    swin_outputs,
    text_folder,
    timm_pooled,
    timm_pooled_folder,
    vision_folder,
    wave_layers,
    wave_mean,
)
from tests.tiny import bert_folder, vit_folder

__all__ = ["FAMILIES", "FUSED_GRAPHS", "GRAPHS", "MAIN", "PRECISIONS", "Family", "by_name", "partner"]

# What TensorRT-RTX builds of every row's graph in these tests.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
image = partial(Family, modality="image", outputs=blocks, pooled=timm_pooled)
text = partial(Family, modality="text", outputs=bert_layers, pooled=class_token, longest=40)
WHOLE: dict[str, Any] = {"layers": 0, "outputs": lambda encoder: [], "oracle": None, "prefix_form": False}

FAMILIES = (
    image(
        name="ViT",
        covers="timm ViT",
        make=vit_folder,
        oracle=ViTOracle,
    ),
    image(
        name="DeiT",
        covers="timm DeiT, distilled",
        beside="MPNet",
        make=image_folder("deit_tiny_distilled_patch16_224"),
        oracle=ViTOracle,
    ),
    image(
        name="DINOv2",
        covers="timm DINOv2, with registers",
        beside="DeBERTa-v3",
        make=image_folder("vit_small_patch14_reg4_dinov2", reg_tokens=2),
        oracle=ViTOracle,
    ),
    image(
        name="SigLIP",
        covers="timm SigLIP's image tower",
        beside="DeBERTa-v2",
        make=image_folder("vit_base_patch16_siglip_224"),
        oracle=ViTOracle,
    ),
    image(
        name="EVA02",
        covers="timm EVA02",
        beside="RoBERTa",
        make=image_folder("eva02_base_patch14_224"),
        oracle=EvaOracle,
        tolerance=1e-6,  # the library computes angles in float32
    ),
    image(
        name="DINOv3",
        covers="timm DINOv3",
        beside="ELECTRA",
        make=image_folder("vit_small_patch16_dinov3", num_reg_tokens=2),
        oracle=EvaOracle,
        tolerance=1e-6,
    ),
    image(
        name="RoPE-ViT",
        covers="timm RoPE-ViT, mixed frequencies",
        beside="DistilBERT",
        make=image_folder("vit_small_patch16_rope_mixed_224"),
        oracle=EvaOracle,
        tolerance=1e-6,
    ),
    image(
        name="BEiT",
        covers="timm BEiT, BEiT v2",
        beside="ALBERT",
        make=image_folder("beit_base_patch16_224"),
        oracle=BeitOracle,
    ),
    image(
        name="Swin",
        covers="timm Swin Transformer v1",
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
        oracle=SwinOracle,
        fused=False,
    ),
    image(
        name="ConvNeXt",
        covers="any other timm image encoder: ConvNeXt",
        make=timm_pooled_folder("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        **WHOLE,
    ),
    image(
        name="ResNet",
        covers="timm ResNet and other convolutional ones",
        make=timm_pooled_folder("resnet10t", channels=(8, 8, 16, 32)),
        **WHOLE,
    ),
    image(
        name="ResNet (transformers)",
        covers="any other transformers image encoder: ResNet, ConvNeXt, ViT, DINOv2, Swin",
        make=vision_folder,
        pooled=lambda encoder, inputs: encoder(**inputs).pooler_output.flatten(1),
        **WHOLE,
    ),
    text(
        name="BERT",
        covers="transformers BERT, MiniLM",
        beside="DeiT",
        make=bert_folder,
        oracle=BertOracle,
    ),
    text(
        name="RoBERTa",
        covers="transformers RoBERTa, XLM-R, CamemBERT",
        beside="DINOv2",
        make=text_folder("roberta", pad_token_id=1),
        oracle=BertOracle,
        longest=38,
    ),
    text(
        name="ELECTRA",
        covers="transformers ELECTRA (discriminator)",
        beside="SigLIP",
        make=text_folder("electra"),
        oracle=BertOracle,
    ),
    text(
        name="DistilBERT",
        covers="transformers DistilBERT",
        beside="ConvNeXt",
        make=text_folder("distilbert", hidden_dim=24),
        outputs=lambda encoder: list(encoder.transformer.layer),
        oracle=DistilBertOracle,
    ),
    text(
        name="MPNet",
        covers="transformers MPNet",
        beside="EVA02",
        make=text_folder("mpnet", pad_token_id=1),
        oracle=MPNetOracle,
        longest=38,
    ),
    text(
        name="DeBERTa-v3",
        covers="transformers DeBERTa-v3",
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
        oracle=DebertaOracle,
        fused=False,
        prefix_form=False,
    ),
    text(
        name="DeBERTa-v2",
        covers="transformers DeBERTa-v2, with the convolution of its larger sizes",
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
        outputs=lambda encoder: [encoder.encoder.conv, *encoder.encoder.layer[1:]],
        oracle=DebertaOracle,
        fused=False,
        prefix_form=False,
    ),
    text(
        name="ModernBERT",
        covers="transformers ModernBERT",
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
        oracle=ModernBertOracle,
        tolerance=1e-5,  # the library turns queries and keys in float32
    ),
    text(
        name="ALBERT",
        covers="any other transformers text encoder that leaves padding out: ALBERT, DeBERTa-v1",
        make=text_folder("albert", embedding_size=8),
        **WHOLE,
    ),
)

audio = partial(Family, modality="audio", outputs=wave_layers, pooled=wave_mean, oracle=Wav2Vec2Oracle)
video = partial(Family, modality="video", oracle=VideoMAEOracle)

FAMILIES += (
    audio(
        name="wav2vec 2.0",
        beside="VideoMAE",
        covers="transformers wav2vec 2.0 with layer norm, clips of any length",
        make=sound_folder("wav2vec2"),
    ),
    audio(
        name="HuBERT",
        beside="VideoMAE fine-tuned",
        covers="transformers HuBERT with layer norm, clips of any length; post-norm layers",
        make=sound_folder("hubert-post-norm"),
    ),
    audio(
        name="wav2vec 2.0 base",
        beside="ViT",
        covers="transformers wav2vec 2.0 and HuBERT with group norm, clips of one fixed length",
        make=sound_folder("wav2vec2-group"),
    ),
    audio(
        name="Whisper",
        covers="transformers Whisper, its encoder",
        make=sound_folder("whisper"),
        outputs=lambda encoder: list(encoder.layers),
        pooled=mean_pooled("audio_features"),
        oracle=WhisperOracle,
    ),
    video(
        name="VideoMAE",
        beside="wav2vec 2.0",
        covers="transformers VideoMAE",
        make=clip_folder("videomae"),
        outputs=lambda encoder: list(encoder.encoder.layer),
        pooled=mean_pooled("video_values"),
    ),
    video(
        name="VideoMAE fine-tuned",
        beside="HuBERT",
        covers="transformers VideoMAE for classification, with the norm behind the mean",
        make=clip_folder("videomae-fine-tuned"),
        outputs=lambda encoder: list(encoder.videomae.encoder.layer),
        pooled=before_the_classifier,
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
