"""The order of the training rows: random in every epoch, and drawn from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

__all__ = ["EpochOrder"]


class EpochOrder(Sampler[int]):
    """Every row once an epoch; with ``lengths``, in an order in which rows of a batch have similar ones.

    What is computed for padding is lost. The order by lengths is transformers' own: rows are permuted; of every fifty
    batches, or a quarter of an epoch where that is less, the rows are sorted by length.

    Args:
        rows: how many there are.
        batch_size: rows of one optimiser step, all processes together.
        seed: of all epochs.
        lengths: of the rows' texts.
    """

    def __init__(self, rows: int, *, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.rows, self.batch_size, self.seed, self.lengths = rows, batch_size, seed, lengths
        self.epoch = 0  # which one the next order is of, counted from 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=order).tolist())
        return iter(LengthGroupedSampler(self.batch_size, lengths=list(self.lengths), generator=order))
