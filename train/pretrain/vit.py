"""Pretraining of the embedded image encoder: a four-layer ViT that sees scenes of digits-ve and no sentence.

What it is taught decides what digits-ve measures, so it is deliberately little:

* the **class token** names the *set* of digits and the *set* of colours on the table, never which goes with which;
* each **patch token** names the digit and the colour of the slot it belongs to, after the last two layers.

Which digit is on the red card is thus in the patches and not in the class token: fusion has to fetch it. All
handwriting comes from the training split of the digits, a little rotated, sheared and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mope_deploy.progress import track
from train.digits_ve.scenes import (
    COLOURS,
    EMPTY,
    FACE_DOWN,
    IMAGE_SIZE,
    SLOTS,
    Digits,
    Scenes,
    load_split,
    render,
    sample_scenes,
)
from train.pretrain.save import check_target, save_folder, schedule

__all__ = ["ARCHITECTURE", "MEAN", "MODEL_ARGS", "STD", "SlotAccuracy", "pretrain_vit"]

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": IMAGE_SIZE, "patch_size": 16, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip
MEAN, STD = (0.6, 0.6, 0.6), (0.25, 0.25, 0.25)

_PATCHES = IMAGE_SIZE // MODEL_ARGS["patch_size"]  # per side
_DIGITS, _COLOURS = 10, len(COLOURS)
_VARIANTS = 48  # times the training handwriting is redrawn
_RENDER = 64  # scenes drawn at once: stays in the processor's cache


@dataclass(frozen=True)
class SlotAccuracy:
    """How often a linear reading of the frozen features is right, 0–1, over scenes of unseen handwriting."""

    digit: float
    """The digit of a face-up card, read from the four patches of its slot."""
    colour: float
    """The colour of a card, face-up or not, read from the four patches of its slot."""
    digit_set: float
    """All of the face-up digits of a scene and no other, read from the class token."""
    colour_set: float
    """All of the colours of a scene and no other, read from the class token."""


def pretrain_vit(
    out: Path, *, scenes: int = 600_000, batch: int = 128, peak_lr: float = 1.5e-3, seed: int = 0
) -> SlotAccuracy:
    """Train the image encoder and write it to ``out`` in timm's ``local-dir`` format.

    Args:
        out: folder to write; replaced only when the training has finished.
        scenes: number of scenes to train on, each drawn afresh.
        batch: scenes a step.
        peak_lr: learning rate after the warm-up.
        seed: of weights, scenes and their drawing.

    Returns:
        accuracies on 4,000 scenes made of the test split's handwriting.
    """
    check_target(out)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = cast(VisionTransformer, timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS))
    heads = _Heads(model.embed_dim)
    steps = scenes // batch
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=peak_lr, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule(steps))
    handwriting = _redrawn(load_split("train"), _VARIANTS)

    model.train()
    for _ in track(range(steps), what="pretraining digits-ve-vit"):
        digits = handwriting[rng.integers(_VARIANTS)]
        pixels, facts = _draw(batch, digits, rng)
        loss = heads.loss(*_states(model, pixels), facts)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()

    accuracy = _evaluate(model, heads, load_split("test"), scenes=4000, seed=seed)
    pretrained_cfg = {
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "fixed_input_size": True, "num_classes": 0, "pool_size": None,
        "mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
    }  # fmt: skip
    config = {
        "architecture": ARCHITECTURE, "num_classes": 0, "num_features": model.num_features,
        "model_args": MODEL_ARGS, "pretrained_cfg": pretrained_cfg,
    }  # fmt: skip
    save_folder(out, {"config.json": config}, model.state_dict())
    return accuracy


@dataclass(frozen=True)
class _Facts:
    """Targets: sets (B, 16) float32; by slot (B, 4) int64 the digit (10 face-down, 11 empty) and colour (6 empty)."""

    sets: Tensor
    digit: Tensor
    colour: Tensor

    @classmethod
    def of(cls, scenes: Scenes) -> _Facts:
        digit = np.select([scenes.digit == FACE_DOWN, scenes.digit == EMPTY], [_DIGITS, _DIGITS + 1], scenes.digit)
        colour = np.where(scenes.colour >= 0, scenes.colour, _COLOURS)
        digits = (scenes.digit[..., None] == np.arange(_DIGITS)).any(axis=1)
        colours = (scenes.colour[..., None] == np.arange(_COLOURS)).any(axis=1)
        return cls(
            sets=torch.from_numpy(np.concatenate([digits, colours], axis=1).astype(np.float32)),
            digit=torch.from_numpy(digit.astype(np.int64)),
            colour=torch.from_numpy(colour.astype(np.int64)),
        )


class _Heads(nn.Module):
    """Linear readings of the features; thrown away after the pretraining."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sets = nn.Linear(width, _DIGITS + _COLOURS)
        self.slots = nn.ModuleList(nn.Linear(width, _DIGITS + 2 + _COLOURS + 1) for _ in range(2))
        self.norm = nn.LayerNorm(width)  # the state before the last layer has no norm of its own

    def loss(self, earlier: Tensor, last: Tensor, facts: _Facts) -> Tensor:
        sets = F.binary_cross_entropy_with_logits(self.sets(last[:, 0]), facts.sets)
        of_last, of_earlier = self.read_slots(last, 0), self.read_slots(self.norm(earlier), 1)
        return 2 * sets + _slot_loss(of_last, facts) + 0.5 * _slot_loss(of_earlier, facts)

    def read_slots(self, states: Tensor, head: int) -> Tensor:
        """(B, 4 slots, 4 patches, classes) from states (B, 1 + N, D); head 0 reads the last layer, 1 the one before."""
        return _by_slot(self.slots[head](states[:, 1:]))


def _slot_loss(logits: Tensor, facts: _Facts) -> Tensor:
    patches = logits.shape[2]
    digit, colour = logits[..., : _DIGITS + 2].flatten(0, 2), logits[..., _DIGITS + 2 :].flatten(0, 2)
    return F.cross_entropy(digit, facts.digit.flatten().repeat_interleave(patches)) + F.cross_entropy(
        colour, facts.colour.flatten().repeat_interleave(patches)
    )


def _by_slot(patches: Tensor) -> Tensor:
    """(B, 16, C) row-major patches → (B, 4, 4, C): slots, patches of a slot."""
    count, _, width = patches.shape
    half = _PATCHES // 2
    return patches.view(count, 2, half, 2, half, width).transpose(2, 3).reshape(count, SLOTS, half * half, width)


def _states(model: VisionTransformer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, 1 + N, D) that enter the last layer, and those that leave the final norm."""
    read = model.forward_intermediates(
        pixels, indices=[len(model.blocks) - 2], norm=False, return_prefix_tokens=True, output_fmt="NLC"
    )
    last, [(patches, prefix)] = cast(tuple[Tensor, list[tuple[Tensor, Tensor]]], read)
    return torch.cat([prefix, patches], dim=1), last


def _draw(count: int, digits: Digits, rng: np.random.Generator) -> tuple[Tensor, _Facts]:
    scenes = sample_scenes(count, digits, rng)
    pixels = np.concatenate([render(scenes[at : at + _RENDER], digits, rng) for at in range(0, count, _RENDER)])
    return _normalise(pixels), _Facts.of(scenes)


def _normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) as the encoder takes it."""
    unit = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _redrawn(digits: Digits, variants: int) -> list[Digits]:
    """The same handwriting ``variants`` times, rotated by up to 12°, sheared by up to 0.15, scaled by up to 12 %."""
    ink = torch.from_numpy(digits.ink).float().unsqueeze(1)  # (n, 1, 24, 24)
    return [
        replace(digits, ink=_affine(ink).round().clamp(0, 255).to(torch.uint8)[:, 0].numpy()) for _ in range(variants)
    ]


def _affine(ink: Tensor) -> Tensor:
    turn, shear, across, down = (torch.rand(4, len(ink)) * 2 - 1) * torch.tensor([0.21, 0.15, 0.12, 0.12]).unsqueeze(1)
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    rows = [(1 + across) * cos, shear - sin, zero, sin, (1 + down) * cos, zero]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    return F.grid_sample(ink, F.affine_grid(theta, list(ink.shape), align_corners=False), align_corners=False)


@torch.no_grad()
def _evaluate(model: VisionTransformer, heads: _Heads, digits: Digits, *, scenes: int, seed: int) -> SlotAccuracy:
    model.eval()
    rng = np.random.default_rng([seed, 1])
    right: list[tuple[float, ...]] = []
    for _ in range(scenes // 500):
        pixels, facts = _draw(500, digits, rng)
        _, last = _states(model, pixels)
        logits = heads.read_slots(last, 0).mean(dim=2)
        digit = logits[..., : _DIGITS + 2].argmax(-1) == facts.digit
        colour = logits[..., _DIGITS + 2 :].argmax(-1) == facts.colour
        sets = (heads.sets(last[:, 0]) > 0) == (facts.sets > 0)
        shown, lies = facts.digit < _DIGITS, facts.colour < _COLOURS
        right.append(
            (
                digit[shown].float().mean().item(),
                colour[lies].float().mean().item(),
                sets[:, :_DIGITS].all(1).float().mean().item(),
                sets[:, _DIGITS:].all(1).float().mean().item(),
            )
        )
    return SlotAccuracy(*np.mean(right, axis=0).tolist())
