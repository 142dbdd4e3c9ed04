"""Tiny random encoders of sound and video, inputs for them, and files to decode. The sounds are synthetic tones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModel, VideoMAEConfig, VideoMAEForVideoClassification

from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from mope_deploy.preprocess import Preprocessing, present_name
from tests.device.clips import write_video
from tests.tiny import LABELS, WORDS, bert_folder, scatter_weights, vit_folder

RATE = 1000  # Hz at the tiny encoders
AUDIO = ("wav2vec2", "hubert-post-norm", "wav2vec2-group", "hubert-group", "whisper")
VIDEO = ("videomae", "videomae-fine-tuned", "videomae-last-norm")
_WAVE = {
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
}
_WAVES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("wav2vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}),
    "hubert-post-norm": ("hubert", {"feat_extract_norm": "layer", "do_stable_layer_norm": False}),
    "wav2vec2-group": ("wav2vec2", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    "hubert-group": ("hubert", {"feat_extract_norm": "group", "do_stable_layer_norm": True}),
}


def audio_folder(folder: Path, kind: str = "wav2vec2", *, seed: int = 2) -> Path:
    """One of :data:`AUDIO`, of width 16 with 2 layers, for sound at 1 kHz."""
    if kind == "whisper":
        encoder = AutoModel.from_config(
            AutoConfig.for_model(
                "whisper",
                vocab_size=20,
                d_model=16,
                encoder_layers=2,
                encoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=24,
                num_mel_bins=10,
                max_source_positions=12,
                max_target_positions=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        )
        preprocessor: dict[str, Any] = {"sampling_rate": RATE, "n_fft": 64, "hop_length": 25, "feature_size": 10}
    else:
        model_type, changes = _WAVES[kind]
        encoder = AutoModel.from_config(AutoConfig.for_model(model_type, **_WAVE, **changes))
        preprocessor = {"sampling_rate": RATE, "do_normalize": True}
    return _save(encoder, folder, preprocessor, seed=seed)


def video_folder(folder: Path, kind: str = "videomae", *, seed: int = 3) -> Path:
    """One of :data:`VIDEO`: 4 frames of 16 × 16 pixels in tubes of 2 × 8 × 8, width 16, 2 layers."""
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        use_mean_pooling=kind != "videomae-last-norm",
        num_labels=3,
    )
    fine_tuned = kind == "videomae-fine-tuned"
    encoder = VideoMAEForVideoClassification(config) if fine_tuned else AutoModel.from_config(config)
    preprocessor = {"size": {"shortest_edge": 18}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    return _save(encoder, folder, preprocessor, seed=seed)


def _save(encoder: Any, folder: Path, preprocessor: dict[str, Any], *, seed: int) -> Path:
    scatter_weights(encoder, seed=seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("weight.original0"):  # norms of weight-normalised filters
                parameter.abs_().add_(0.5)
    encoder.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder


class Encoders(dict[str, Path]):
    """Folders of tiny encoders by kind, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        folder = self.root / kind
        if kind == "image":
            vit_folder(folder)
        elif kind == "text":
            bert_folder(folder)
        elif kind in VIDEO:
            video_folder(folder, kind)
        else:
            audio_folder(folder, kind)
        self[kind] = folder
        return folder


def modality_of(kind: str) -> str:
    return kind if kind in ("image", "text") else "video" if kind in VIDEO else "audio"


def media_model(encoders: Encoders, main: str, *complementary: str, seed: int = 0, **changes: Any) -> MoPE:
    """A tiny MoPE of these kinds of encoders, its prompts large enough to matter."""

    def spec(kind: str) -> EncoderSpec:
        seconds = 0.4 if kind in _WAVES else None
        return EncoderSpec(
            modality=modality_of(kind),
            source=f"dir:{encoders[kind]}",
            prompts=2 if kind == "text" and main != "text" else 0,
            max_seconds=seconds,
        )

    values = {"labels": LABELS, "prompt_length": 3, "experts": 5, "d_x": 2, "d_y": 4} | changes
    config = MoPEConfig(main=spec(main), complementary=tuple(spec(kind) for kind in complementary), **values)
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if name.endswith((".tokens", ".prompts")) or name.startswith("stand_ins."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def raw_samples(count: int, *, seed: int = 0, missing: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Every modality of ``count`` samples in memory; every third lacks each of ``missing``."""
    from mope_deploy.preprocess import Waveform

    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        sample: dict[str, Any] = {
            "image": random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8),
            "text": " ".join(random.choice(WORDS[5:], 1 + i % 7)),
            "audio": Waveform(tone(200 + 31 * i + 57 * seed, 0.1 + 0.07 * (i % 6), rate=2 * RATE), 2 * RATE),
            "video": random.integers(0, 256, (3 + i % 4, 20, 24, 3), dtype=np.uint8),
        }
        for j, name in enumerate(missing):
            if i % 3 == j % 3:
                sample[name] = None
        found.append(sample)
    return found


def make_inputs(preprocessing: Preprocessing, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The model's inputs for raw samples."""
    arrays = preprocessing.collate(
        [
            {
                name: None if sample[name] is None else preprocessing.load(name, sample[name])
                for name in preprocessing.modalities
            }
            for sample in samples
        ]
    )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def lone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch as it would be alone: without the padding that its batch-mates made necessary."""
    found = {name: value[row : row + 1] for name, value in inputs.items()}
    for mask, values in (("attention_mask", "input_ids"), ("audio_mask", "audio_values")):
        if mask in found:
            length = int(found[mask].sum())
            found[mask], found[values] = found[mask][:, :length], found[values][:, :length]
    return found


def tone(hertz: float, seconds: float, *, rate: int, level: float = 0.5) -> NDArray[np.float32]:
    """A sine tone, float32 (samples,)."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


__all__ = [
    "AUDIO",
    "RATE",
    "VIDEO",
    "Encoders",
    "audio_folder",
    "lone",
    "make_inputs",
    "media_model",
    "modality_of",
    "present_name",
    "raw_samples",
    "tone",
    "video_folder",
    "write_video",
]
