"""Features y of complementary encoders that carry no trained prompts: they never change, so each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mope_deploy.errors import DataError
from mope_deploy.model import MoPE
from mope_deploy.model.fusion import ComplementaryEncoder
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track
from train.data import MediaCache, Split

__all__ = ["cacheable", "complementary_features", "encode_different", "fit_statistics", "standardised"]

STATISTICS_ROWS = 200_000  # of training features; more would cost memory and change nothing


def cacheable(model: MoPE, *, limit_mb: int, splits: list[Split]) -> bool:
    """Whether no complementary encoder carries prompts and all their features fit into ``limit_mb`` MiB."""
    if any(spec.prompts for spec in model.config.complementary):
        return False
    needed = sum(
        4 * _width(encoder) * len(split.values[name])
        for name, encoder in model.complementary.items()
        for split in splits
    )
    return needed <= limit_mb * 2**20


def complementary_features(
    model: MoPE, split: Split, media: MediaCache, *, batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """y of every different input of a split, float32 (number of them, D_y) on the CPU, by modality."""
    model.eval()
    return {
        name: encode_different(
            encoder,
            model.preprocessing,
            name,
            split,
            media,
            width=_width(encoder),
            batch_size=batch_size,
            device=device,
        )
        for name, encoder in model.complementary.items()
    }


@torch.no_grad()
def encode_different(
    encoder: Callable[[Mapping[str, Tensor]], Tensor],
    preprocessing: Preprocessing,
    modality: str,
    split: Split,
    media: MediaCache,
    *,
    width: int,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """``encoder`` on every different input of a split: float32 (number of them, width) on the CPU.

    Texts are encoded in order of length, so that little padding is computed.
    """
    different = split.values[modality]
    order = list(range(len(different)))
    if modality == "text":
        order.sort(key=lambda i: len(different[i]))
    found = torch.empty(len(different), width)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for chunk in track(chunks, what=f"encoding {len(different):,} {modality}s of {split.name}"):
        items = [different[i] if modality == "text" else media.get(different[i], modality) for i in chunk]
        arrays = preprocessing.arrays(modality, items)
        found[chunk] = encoder({key: torch.from_numpy(array).to(device) for key, array in arrays.items()}).float().cpu()
    return found


def fit_statistics(model: MoPE, split: Split, y: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Fit the model's standardisation to the training rows, and return ``y`` standardised by it.

    Args:
        model: one with ``y_norm="standardise"``, not fitted yet.
        split: the training rows; a text that occurs often counts often, rows without one do not.
        y: what :func:`complementary_features` returned for them.
        seed: chooses the rows where there are more than 200,000.
    """
    rows: NDArray[np.int64] = np.arange(len(split))
    if len(rows) > STATISTICS_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, STATISTICS_ROWS, replace=False))
    chosen = {name: split.column(name)[rows] for name in y}
    absent = [name for name, index in chosen.items() if not (index >= 0).any()]
    if absent:
        raise DataError(
            f"{split.source}: no row has {absent[0]}", todo="train without that modality, or give rows that have it"
        )
    model.fit_statistics({name: y[name][torch.from_numpy(index[index >= 0])] for name, index in chosen.items()})
    return standardised(model, y)


def standardised(model: MoPE, y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw features as the model's own encoders return them once its statistics are fitted."""
    found = {}
    for name, features in y.items():
        encoder = model.complementary[name]
        assert isinstance(encoder, ComplementaryEncoder)
        found[name] = (features - encoder.y_mean.cpu()) / encoder.y_std.cpu()
    return found


def _width(encoder: nn.Module) -> int:
    assert isinstance(encoder, ComplementaryEncoder)
    return encoder.backbone.feature_width
