"""Batches of texts that are about as long: what is computed for padding is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

__all__ = ["LengthBuckets"]


class LengthBuckets(Sampler[int]):
    """Every row once an epoch, in an order in which rows of a batch have similar lengths.

    The order is transformers' own (rows are permuted; of every fifty batches, or a quarter of an epoch where that is
    less, the rows are sorted by length), but drawn from the seed and the epoch alone, so that a resumed run goes on
    with it.

    Args:
        lengths: of the n rows.
        batch_size: rows of one optimiser step, all processes together.
        seed: of all epochs.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=order))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next order is of, counted from 0."""
        self.epoch = epoch
