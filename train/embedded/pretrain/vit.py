"""Pretraining of the embedded image encoder: a four-layer ViT that sees scenes of digits-ve and no sentence.

What it is taught decides what digits-ve measures, so it is deliberately little:

* the **class token** names the *set* of digits and the *set* of colours on the table, never which goes with which;
* each **patch token** names the digit and the colour of the slot it belongs to, after every layer;
* from the second layer on it also tells its card from every other kind of card, by the angle to one direction per kind.

Which digit is on the red card is thus in the patches and not in the class token: fusion has to fetch it. It can do so
because the patches know it early: what a prompt finds in one layer only the next layer's class token can read. All
handwriting comes from the training split of the digits, a little rotated, sheared and scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from train.embedded.digits_ve.scenes import (
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
from train.embedded.pretrain.save import check_target, optimise, save_folder

__all__ = ["ARCHITECTURE", "MEAN", "MODEL_ARGS", "STD", "SlotAccuracy", "pretrain_vit"]

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": IMAGE_SIZE, "patch_size": 16, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip
MEAN, STD = (0.6, 0.6, 0.6), (0.25, 0.25, 0.25)

_PATCHES = IMAGE_SIZE // MODEL_ARGS["patch_size"]  # per side
_DIGITS, _COLOURS = 10, len(COLOURS)
_CLASSES = (_DIGITS + 2, _COLOURS + 1)  # of a slot: digit, face-down or empty; colour or empty
_VARIANTS = 48  # times the training handwriting is redrawn
_KINDS = _DIGITS * _COLOURS + _COLOURS + 1  # of card: digit and colour, face-down by colour, none
_COSINE_SCALE = 16.0
_FIRST_LAYER_WEIGHT = 0.5  # a slot's four patches have met only once there
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
    out: Path, *, scenes: int = 400_000, batch: int = 128, peak_lr: float = 1.5e-3, seed: int = 0
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
    heads = _Heads(model.embed_dim, len(model.blocks))
    handwriting = _redrawn(load_split("train"), _VARIANTS)

    def loss() -> Tensor:
        pixels, facts = _draw(batch, handwriting[rng.integers(_VARIANTS)], rng)
        return heads.loss(_states(model, pixels), facts)

    optimise(model, heads, loss, steps=scenes // batch, lr=peak_lr, decay=0.05, what="digits-ve-vit")
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
    """Linear readings of the states after each layer; thrown away after the pretraining."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.sets = nn.Linear(width, _DIGITS + _COLOURS)
        self.slots = nn.ModuleList(nn.Linear(width, sum(_CLASSES)) for _ in range(depth))
        self.kinds = nn.ParameterList(nn.Parameter(torch.randn(_KINDS, width)) for _ in range(depth))
        # Only the last state went through the encoder's own norm.
        self.norms = nn.ModuleList([*(nn.LayerNorm(width) for _ in range(depth - 1)), nn.Identity()])

    def loss(self, states: Sequence[Tensor], facts: _Facts) -> Tensor:
        loss = 2 * F.binary_cross_entropy_with_logits(self.sets(states[-1][:, 0]), facts.sets)
        for layer, state in enumerate(states):
            weight = _FIRST_LAYER_WEIGHT if layer == 0 else 1.0
            loss = loss + weight * _slot_loss(self.read_slots(state, layer), facts)
            if layer > 0:
                loss = loss + self._kind_loss(state, layer, facts)
        return loss

    def read_slots(self, state: Tensor, layer: int) -> Tensor:
        """(B, 4 slots, 4 patches, classes) from the state (B, 1 + N, D) after a layer."""
        return _by_slot(self.slots[layer](self.norms[layer](state)[:, 1:]))

    def _kind_loss(self, state: Tensor, layer: int, facts: _Facts) -> Tensor:
        """Cross entropy over kinds of card by cosine: a small angle to the own kind, wide ones to all others.

        A sum of a colour's and a digit's direction would do for a plain linear reading; kept apart by angle, a red
        seven has a direction of its own, which an attention key can find.
        """
        patches = _by_slot(self.norms[layer](state)[:, 1:]).flatten(0, 2)  # (B · 16, D)
        cosine = F.normalize(patches, dim=-1) @ F.normalize(self.kinds[layer], dim=-1).T
        shown = facts.digit < _DIGITS
        kind = torch.where(shown, facts.colour * _DIGITS + facts.digit, _DIGITS * _COLOURS + facts.colour)  # (B, 4)
        return F.cross_entropy(
            _COSINE_SCALE * cosine, kind.flatten().repeat_interleave(patches.shape[0] // kind.numel())
        )


def _slot_loss(logits: Tensor, facts: _Facts) -> Tensor:
    parts = zip(logits.flatten(0, 2).split(_CLASSES, dim=-1), (facts.digit, facts.colour), strict=True)
    digit, colour = (F.cross_entropy(part, true.flatten().repeat_interleave(logits.shape[2])) for part, true in parts)
    return digit + colour


def _by_slot(patches: Tensor) -> Tensor:
    """(B, 16, C) row-major patches → (B, 4, 4, C): slots, patches of a slot."""
    count, _, width = patches.shape
    half = _PATCHES // 2
    return patches.view(count, 2, half, 2, half, width).transpose(2, 3).reshape(count, SLOTS, half * half, width)


def _states(model: VisionTransformer, pixels: Tensor) -> list[Tensor]:
    """States (B, 1 + N, D) after each layer, the last one after the final norm."""
    last, states = cast(
        tuple[Tensor, list[tuple[Tensor, Tensor]]],
        model.forward_intermediates(
            pixels, indices=list(range(len(model.blocks) - 1)), norm=False, return_prefix_tokens=True, output_fmt="NLC"
        ),
    )
    return [*(torch.cat([prefix, patches], dim=1) for patches, prefix in states), last]


def _draw(count: int, digits: Digits, rng: np.random.Generator) -> tuple[Tensor, _Facts]:
    """Pictures float32 (B, 3, H, W) as the encoder takes them, and what they show."""
    scenes = sample_scenes(count, digits, rng)
    pixels = np.concatenate([render(scenes[at : at + _RENDER], digits, rng) for at in range(0, count, _RENDER)])
    unit = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), _Facts.of(scenes)


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
    right: list[list[float]] = []
    for _ in range(scenes // 500):
        pixels, facts = _draw(500, digits, rng)
        states = _states(model, pixels)
        digit, colour = heads.read_slots(states[-1], len(states) - 1).mean(dim=2).split(_CLASSES, dim=-1)
        sets = (heads.sets(states[-1][:, 0]) > 0) == (facts.sets > 0)
        each = (
            (digit.argmax(-1) == facts.digit)[facts.digit < _DIGITS],
            (colour.argmax(-1) == facts.colour)[facts.colour < _COLOURS],
            sets[:, :_DIGITS].all(1),
            sets[:, _DIGITS:].all(1),
        )
        right.append([one.float().mean().item() for one in each])
    return SlotAccuracy(*np.mean(right, axis=0).tolist())
