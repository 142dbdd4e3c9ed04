"""Features of frozen encoders without trained prompts: they never change, so each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mope_deploy.console import err
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE
from mope_deploy.model.backbones import Backbone
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track
from train.data import MediaCache, Split
from train.y_cache import YCache, encoder_key, sample_key

__all__ = ["Features", "cacheable", "fit_statistics", "standardised"]

STATISTICS_ROWS = 200_000  # of training features; more would cost memory and change nothing
BATCH = 32  # samples that an encoder is given at once, at most
BLOCK = 8192  # samples after which what was computed is kept, should the run be interrupted

Encoder = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Features:
    """What makes the features of a model's inputs, or finds them where an earlier run has left them.

    A feature has the same bits whatever else is computed beside it, so that what was kept by a run with other data is
    what this run would have computed: an encoder is given inputs of one shape at a time without padding among them,
    and a batch that is not full is filled up. (That a row of a product does not depend on the other rows, where the
    shapes are the same, is how libraries compute, not a promise of theirs.)

    Args:
        preprocessing: of the model.
        media: decoded pictures and clips.
        device: where the encoders are.
        batch_size: the most that fits into its memory at once.
        cache: features on disk, or None.
        process, processes: which of how many processes this one is; each computes its part of what is missing.
        wait: returns once every process has called it.
    """

    preprocessing: Preprocessing
    media: MediaCache
    device: torch.device
    batch_size: int = BATCH
    cache: YCache | None = None
    process: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    def alone(self) -> Features:
        """The same for what one process does without the others."""
        return replace(self, process=0, processes=1, wait=lambda: None)

    def bare(self, backbone: Backbone, modality: str, split: Split) -> Tensor:
        """Pooled features of the inputs of a split, from an encoder without any prompt.

        Returns:
            float32 (number of different inputs, D_y) on the CPU, in the order of ``split.values``; zeros where no row
            of the split has an input.
        """
        encoder = _unprompted(backbone)
        used = _used(split, modality)
        width = backbone.feature_width
        found = torch.zeros(len(split.values[modality]), width)
        if not len(used):
            return found
        values = [split.values[modality][i] for i in used]
        what = f"encoding {modality}s of {split.name}"
        if self.cache is None:
            found[used] = self._encode(encoder, modality, values, width=width, what=what)
            return found
        name = encoder_key(backbone, self.preprocessing, modality, device=self.device, batch=self._size)
        of_value = [sample_key(modality, value) for value in values]
        # Files of equal content under several names are one sample.
        by_key = dict(zip(of_value, values, strict=True))
        keys = list(by_key)
        cache = self.cache
        features, there = cache.read(name, keys, width=width)

        def compute(missing: list[int]) -> None:
            for start in range(0, len(missing), BLOCK):
                block = missing[start : start + BLOCK]
                made = self._encode(encoder, modality, [by_key[keys[i]] for i in block], width=width, what=what)
                features[block] = made
                cache.write(name, [keys[i] for i in block], made)

        absent = [i for i, known in enumerate(there.tolist()) if not known]
        compute([i for i in absent if i % self.processes == self.process])
        if self.processes > 1:
            self.wait()
            others = [i for i in absent if i % self.processes != self.process]
            theirs, written = cache.read(name, [keys[i] for i in others], width=width)
            features[others] = theirs
            # What they could not write, or not where this process reads.
            compute([i for i, known in zip(others, written.tolist(), strict=True) if not known])
        err.print(
            f"y      {len(keys):,} {modality}s of {split.name}: {len(keys) - len(absent):,} found in "
            f"{cache.folder}, {len(absent):,} computed",
            markup=False,
        )
        number = {key: i for i, key in enumerate(keys)}
        found[used] = features[[number[key] for key in of_value]]
        return found

    def prompted(self, model: MoPE, modality: str, split: Split) -> Tensor:
        """As :meth:`bare`, from a complementary encoder with its prompts as they are now; nothing is kept."""
        encoder = model.complementary_encoders()[modality].eval()
        used = _used(split, modality)
        found = torch.zeros(len(split.values[modality]), encoder.backbone.feature_width)
        values = [split.values[modality][i] for i in used]
        found[used] = self._encode(
            encoder,
            modality,
            values,
            width=encoder.backbone.feature_width,
            what=f"encoding {modality}s of {split.name}",
        )
        return found

    @property
    def _size(self) -> int:
        return min(BATCH, self.batch_size)

    @torch.no_grad()
    def _encode(self, encoder: Encoder, modality: str, values: Sequence[str], *, width: int, what: str) -> Tensor:
        """``encoder`` on every value: float32 (n, width) on the CPU."""
        found = torch.empty(len(values), width)
        waiting: dict[tuple[tuple[int, ...], ...], list[tuple[int, dict[str, Tensor]]]] = {}

        def run(batch: list[tuple[int, dict[str, Tensor]]], size: int) -> None:
            filled = [batch[min(i, len(batch) - 1)][1] for i in range(size)]
            inputs = {key: torch.cat([item[key] for item in filled]).to(self.device) for key in filled[0]}
            found[[place for place, _ in batch]] = encoder(inputs)[: len(batch)].float().cpu()

        # Waveforms of any length would seldom meet another of theirs.
        audio = self.preprocessing.audio
        size = 1 if modality == "audio" and audio is not None and not audio.fixed else self._size
        for place, value in enumerate(track(values, what=what)):
            item = value if modality == "text" else self.media.get(value, modality)
            arrays = self.preprocessing.arrays(modality, [item])
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
            shape = tuple(tuple(tensor.shape) for tensor in tensors.values())
            batch = waiting.setdefault(shape, [])
            batch.append((place, tensors))
            if len(batch) == size:
                run(waiting.pop(shape), size)
        for batch in waiting.values():
            run(batch, size)
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
    chosen = {name: split.column(name)[rows] for name in y}
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


def _used(split: Split, modality: str) -> NDArray[np.int64]:
    """Which inputs the rows of a split have; of a part of a file's rows, or without bad ones, that is not all."""
    index = split.column(modality)
    return np.unique(index[index >= 0])


def _unprompted(backbone: Backbone) -> Encoder:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        x, mask = backbone.embed(inputs)
        for index in range(backbone.depth):
            x = backbone.layer(index, x, None, mask)
        return backbone.finish(x, mask)

    return run
