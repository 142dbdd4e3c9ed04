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
from mope_deploy.model.backbones import Encoder as Backbone
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track
from train.data import MediaCache, Split
from train.y_cache import YCache, batch_keys, encoder_key

__all__ = ["Features", "cacheable", "fit_statistics", "standardised"]

STATISTICS_ROWS = 200_000  # of training features; more would cost memory and change nothing
KEPT_BATCHES = 64  # after so many what was computed is kept, should the run be interrupted

Encoder = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Features:
    """What makes the features of a model's inputs, or finds them where an earlier run has left them.

    Inputs are encoded in batches that depend on the file they are from and nothing else: texts in order of length, so
    that little padding is computed, others in their own order. The last bits of a feature depend on its batch-mates,
    and training makes much of little; so what was kept is taken for the same batch only, and gives the bits that
    computing would.

    Args:
        preprocessing: of the model.
        media: decoded pictures and clips.
        device: where the encoders are.
        batch_size: inputs that are encoded together.
        cache: features on disk, or None.
        process, processes: which of how many processes this one is; each computes its part of what is missing.
        wait: returns once every process has called it.
    """

    preprocessing: Preprocessing
    media: MediaCache
    device: torch.device
    batch_size: int
    cache: YCache | None = None
    process: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    def alone(self) -> Features:
        """The same for what one process does without the others."""
        return replace(self, process=0, processes=1, wait=lambda: None)

    def bare(self, backbone: Backbone, modality: str, split: Split) -> Tensor:
        """Pooled features of the different inputs of a split, from an encoder without any prompt.

        Returns:
            float32 (number of them, D_y) on the CPU, in the order of ``split.values``; zeros for files that no row
            has any more, because they cannot be read.
        """
        encoder = _unprompted(backbone)
        batches = self._batches(modality, split)
        found = torch.zeros(len(split.values[modality]), backbone.feature_width)
        if self.cache is None:
            self._encode(encoder, modality, split, batches, into=found)
            return found
        cache, values = self.cache, split.values[modality]
        name = encoder_key(backbone, self.preprocessing, modality, device=self.device)
        keys = [batch_keys(modality, [values[i] for i in batch]) for batch in batches]

        def read(chosen: list[int]) -> list[int]:
            """Fill in what is there of these batches; those of which something is not."""
            rows = [i for b in chosen for i in batches[b]]
            features, there = cache.read(name, [key for b in chosen for key in keys[b]], width=found.shape[1])
            found[rows] = features
            whole = there.split([len(batches[b]) for b in chosen]) if chosen else ()
            return [b for b, part in zip(chosen, whole, strict=True) if not bool(part.all())]

        def compute(chosen: list[int]) -> None:
            for start in range(0, len(chosen), KEPT_BATCHES):
                block = chosen[start : start + KEPT_BATCHES]
                self._encode(encoder, modality, split, [batches[b] for b in block], into=found)
                rows = [i for b in block for i in batches[b]]
                cache.write(name, [key for b in block for key in keys[b]], found[rows])

        missing = read(list(range(len(batches))))
        compute([b for b in missing if b % self.processes == self.process])
        if self.processes > 1:
            self.wait()
            # Nothing is left then, unless another process could not write, or not where this one reads.
            compute(read([b for b in missing if b % self.processes != self.process]))
        total, computed = sum(map(len, batches)), sum(len(batches[b]) for b in missing)
        err.print(
            f"cache  {modality}s of {split.name}: {total - computed:,} found in {cache.folder}, {computed:,} computed",
            markup=False,
        )
        return found

    def prompted(self, model: MoPE, modality: str, split: Split) -> Tensor:
        """As :meth:`bare`, from a complementary encoder with its prompts as they are now; nothing is kept."""
        encoder = model.complementary_encoders()[modality].eval()
        found = torch.zeros(len(split.values[modality]), encoder.backbone.feature_width)
        self._encode(encoder, modality, split, self._batches(modality, split), into=found)
        return found

    def _batches(self, modality: str, split: Split) -> list[list[int]]:
        """Indices into ``split.values`` of what is encoded together."""
        values, column = split.values[modality], split.column(modality)
        used = set(column[column >= 0].tolist())
        order = [i for i, value in enumerate(values) if i in used or self._readable(modality, value)]
        if modality == "text":
            order.sort(key=lambda i: len(values[i]))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _readable(self, modality: str, value: str) -> bool:
        if modality == "text":
            return True
        try:
            self.media.get(value, modality)
        except DataError:
            return False
        return True

    @torch.no_grad()
    def _encode(
        self, encoder: Encoder, modality: str, split: Split, batches: Sequence[list[int]], *, into: Tensor
    ) -> None:
        """Put the features of these batches into their rows of ``into`` (number of inputs, D_y)."""
        values = split.values[modality]
        total = sum(map(len, batches))
        for batch in track(batches, what=f"encoding {total:,} {modality}s of {split.name}"):
            items = [values[i] if modality == "text" else self.media.get(values[i], modality) for i in batch]
            arrays = self.preprocessing.arrays(modality, items)
            inputs = {key: torch.from_numpy(array).to(self.device) for key, array in arrays.items()}
            into[batch] = encoder(inputs).float().cpu()


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


def _unprompted(backbone: Backbone) -> Encoder:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        x, mask = backbone.embed(inputs)
        for index in range(backbone.depth):
            x = backbone.run_layer(index, x, None, mask, form="token")
        return backbone.finish(x, mask)

    return run
