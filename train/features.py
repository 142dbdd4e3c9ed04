"""Features of frozen encoders without trained prompts: they never change, so each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mope_deploy.errors import DataError
from mope_deploy.model import MoPE
from mope_deploy.model.backbones import Encoder
from mope_deploy.progress import track
from train.data import MediaCache, Split

__all__ = ["Features", "cacheable", "fit_statistics", "standardised"]

STATISTICS_ROWS = 200_000  # of training features; more would cost memory and change nothing


@dataclass(frozen=True)
class Features:
    """What makes the features of a model's inputs, each different input once.

    Args:
        media: decoded pictures and clips, and the model's preprocessing.
        device: where the encoders are.
        batch_size: inputs that are encoded together.
    """

    media: MediaCache
    device: torch.device
    batch_size: int

    def bare(self, backbone: Encoder, modality: str, split: Split) -> Tensor:
        """Pooled features of the different inputs of a split, from an encoder without any prompt.

        Returns:
            float32 (number of them, D_y) on the CPU, in the order of ``split.values``; zeros for those that no row has.
        """

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            x, mask = backbone.embed(inputs)
            for index in range(backbone.depth):
                x = backbone.run_layer(index, x, None, mask, form="token")
            return backbone.finish(x, mask)

        return self._encode(run, backbone.feature_width, modality, split)

    def prompted(self, model: MoPE, modality: str, split: Split) -> Tensor:
        """As :meth:`bare`, from a complementary encoder with its prompts as they are now."""
        encoder = model.complementary_encoders()[modality].eval()
        return self._encode(encoder, encoder.backbone.feature_width, modality, split)

    @torch.no_grad()
    def _encode(
        self, encoder: Callable[[Mapping[str, Tensor]], Tensor], width: int, modality: str, split: Split
    ) -> Tensor:
        values, preprocessing = split.values[modality], self.media.preprocessing
        used = np.unique(split.columns[modality])
        order = used[used >= 0].tolist()
        if modality == "text":
            order.sort(key=lambda i: len(values[i]))  # little padding
        found = torch.zeros(len(values), width)
        starts = range(0, len(order), self.batch_size)
        for start in track(starts, what=f"encoding {len(order):,} {modality}s of {split.name}"):
            batch = order[start : start + self.batch_size]
            items = [values[i] if modality == "text" else self.media.get(values[i], modality) for i in batch]
            arrays = preprocessing.arrays(modality, items)
            inputs = {key: torch.from_numpy(array).to(self.device) for key, array in arrays.items()}
            found[batch] = encoder(inputs).float().cpu()
        return found


def cacheable(model: MoPE, *, limit_mb: int, splits: Sequence[Split]) -> tuple[str, ...]:
    """Modalities whose encoder carries no prompts, as long as their features together fit into ``limit_mb`` MiB."""
    chosen: list[str] = []
    room = limit_mb * 2**20
    for spec in model.config.complementary:
        width = model.complementary_encoders()[spec.modality].backbone.feature_width
        needed = sum(4 * width * len(split.values[spec.modality]) for split in splits)
        if not spec.prompts and needed <= room:
            chosen.append(spec.modality)
            room -= needed
    return tuple(chosen)


def fit_statistics(model: MoPE, split: Split, y: Mapping[str, Tensor], *, seed: int) -> None:
    """Fit the model's standardisation to the training rows.

    Args:
        model: one with ``y_norm="standardise"``, not fitted yet.
        split: the training rows; a text that occurs often counts often, rows without one do not.
        y: features of their different inputs, by modality, of every complementary encoder.
        seed: chooses the rows where there are more than 200,000.
    """
    rows: NDArray[np.int64] = np.arange(len(split))
    if len(rows) > STATISTICS_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, STATISTICS_ROWS, replace=False))
    chosen = {name: split.columns[name][rows] for name in y}
    absent = [name for name, index in chosen.items() if not (index >= 0).any()]
    if absent:
        raise DataError(
            f"{split.source}: no row has {absent[0]}", todo="train without that modality, or give rows that have it"
        )
    model.fit_statistics({name: y[name][torch.from_numpy(index[index >= 0])] for name, index in chosen.items()})


def standardised(model: MoPE, y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bare features as the model's own encoders return them: standardised where it does that, else as they are."""
    found = dict(y)
    for name, features in y.items():
        encoder = model.complementary_encoders()[name]
        if encoder.standardise:
            found[name] = (features - encoder.y_mean.cpu()) / encoder.y_std.cpu()
    return found
