"""What the gate feeds to both sides: batches of sizes and lengths other than the traced ones, and real samples.

Letters: B batch · T text length in tokens · S samples of a clip · C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.graph.exporter_config import EXAMPLE_BATCH, EXAMPLE_LENGTH, MoPEGraph
from export.limits import MIN_VALUES
from mope_deploy.data import Sample
from mope_deploy.preprocess import AudioSpec, Preprocessing, VideoSpec, present_name

__all__ = ["Case", "batches_of", "generated_cases", "rows_needed", "sample_cases"]

_SHORTEST = 3  # tokens: one word between two special ones
_REAL_BATCH = 16


# Of a nearly constant row. Its variance, 2e-5, is of the size of the ε of norms (1e-12 to 1e-5), while a norm that
# divides by it makes 2**-24 of rounding 1.5e-5, well below what the gate takes for rounding at most.
_SPREAD = np.float32(4e-3)


@dataclass(frozen=True, eq=False)
class Case:
    """One batch that both sides compute.

    Attributes:
        name: what it is, for the report.
        source: ``"generated"`` or ``"samples"``.
        inputs: arrays by input name.
    """

    name: str
    source: str
    inputs: dict[str, NDArray[Any]]

    @property
    def batch(self) -> int:
        return len(next(iter(self.inputs.values())))


def rows_needed(classes: int) -> int:
    """Samples whose logits are at least :data:`MIN_VALUES` values, and a quarter more."""
    return math.ceil(1.25 * MIN_VALUES / classes)


def generated_cases(graph: MoPEGraph, *, seed: int = 0) -> list[Case]:
    """Random inputs of every modality in awkward batches, none of the traced size, until there are enough values.

    Texts have one to T real tokens less than T in turn, so most rows are padded; one case has no padding at all and one
    nothing but padded rows. No row is ever fully masked: attention over nothing is not defined. Clips of varying length
    are padded in the same way; a modality that may be missing is, in some rows of each batch. One case is nearly
    constant: flat pictures, silence, one word over and over. Random values have a variance of 1, beside which the ε of
    a norm is nothing; these come as near to none as inputs can, and devices see them.
    """
    random = np.random.default_rng(seed)
    longest = graph.max_length or _SHORTEST
    lengths = [T for T in (5, longest, 11, _SHORTEST) if _SHORTEST <= T <= longest and T != EXAMPLE_LENGTH] or [longest]
    paddings = ("padded", "padded", "unpadded", "all rows padded", "padded")
    plan = zip((1, 3, 8, 5, 6), paddings, itertools.cycle(lengths))
    cases = [_case(graph, random, B, T, padding) for B, padding, T in plan]
    cases[-1] = _nearly_constant(cases[-1])
    fewest = min(graph.num_labels, graph.num_layers * graph.num_experts)  # values that any output has of a sample
    for B, T in zip(itertools.cycle((13, 16)), itertools.cycle(lengths)):
        if sum(case.batch for case in cases) >= rows_needed(fewest):
            return cases
        cases.append(_case(graph, random, B, T, "padded"))
    raise AssertionError("unreachable: the plan is endless")


def sample_cases(preprocessing: Preprocessing, samples: Sequence[Sample]) -> Iterator[Case]:
    """Real samples as preprocessing makes them, in batches that are not of the traced size."""
    for start, stop in batches_of(len(samples)):
        inputs = preprocessing.collate([sample.load(preprocessing) for sample in samples[start:stop]])
        yield Case(f"samples {start + 1} to {stop}", "samples", inputs)


def batches_of(count: int) -> Iterator[tuple[int, int]]:
    """Start and stop of batches of 1, 3, then 16: not the traced size, and one is what most devices run."""
    edges = (0, 1, 4, *range(4 + _REAL_BATCH, count, _REAL_BATCH))
    return itertools.pairwise([*(edge for edge in edges if edge < count), count])


def _case(graph: MoPEGraph, random: np.random.Generator, B: int, T: int, padding: str) -> Case:
    assert (B, T) != (EXAMPLE_BATCH, EXAMPLE_LENGTH)
    inputs: dict[str, NDArray[Any]] = {}
    if graph.image_size is not None:
        inputs["pixel_values"] = random.standard_normal((B, graph.num_channels, *graph.image_size), dtype=np.float32)
    if graph.vocab_size is not None:
        # Real tokens per row: T, T − 1, … in turn, starting one lower if every row is to be padded.
        first = 1 if padding == "all rows padded" else 0
        cut = np.zeros(B, int) if padding == "unpadded" else (np.arange(B) + first) % max(1, T - 1)
        real = np.maximum(1, T - np.maximum(cut, first))  # (B,)
        mask = (np.arange(T) < real[:, None]).astype(np.int64)  # (B, T)
        inputs["input_ids"] = random.integers(0, graph.vocab_size, (B, T)) * mask
        inputs["attention_mask"] = mask
    if graph.audio is not None:
        inputs |= _audio(graph.audio, random, B, padding)
    if graph.video is not None:
        inputs |= _whole(graph.video, random, B)
    for i, modality in enumerate(graph.missing):
        inputs[present_name(modality)] = (np.arange(B) % 3 != i % 3).astype(np.int64)
    name = f"{B} × {T} tokens, {padding}" if graph.vocab_size is not None else f"batch of {B}, {padding}"
    return Case(name, "generated", {key: inputs[key] for key in graph.input_names})


def _nearly_constant(case: Case) -> Case:
    """The same rows with every value near its row's first one, falling from row to row down to 0."""
    inputs = dict(case.inputs)
    for name, array in inputs.items():
        first = array.reshape(len(array), -1)[:, 0].reshape(-1, *(1,) * (array.ndim - 1))
        if array.dtype == np.float32:
            steps = (np.arange(len(array), dtype=np.float32)[::-1] / len(array)).reshape(first.shape)  # 0 at last
            inputs[name] = np.where(array == 0, array, first * steps + _SPREAD * steps * array)
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"][:, :1] * inputs["attention_mask"]
    return Case(f"{case.name}, nearly constant", case.source, inputs)


def _audio(spec: AudioSpec, random: np.random.Generator, B: int, padding: str) -> dict[str, NDArray[Any]]:
    """Random clips: of the fixed form, or of 1 to about 10 times the encoder's shortest clip, padded as texts are."""
    if spec.fixed:
        return _whole(spec, random, B)
    S = min(spec.max_samples, (7 + B % 4) * spec.min_samples + B)  # another one for every batch
    first = 1 if padding == "all rows padded" else 0
    cut = np.zeros(B, int) if padding == "unpadded" else (np.arange(B) + first) * (S // 7)
    real = np.maximum(spec.min_samples, S - cut)  # (B,)
    mask = (np.arange(S) < real[:, None]).astype(np.int64)  # (B, S)
    return {
        "audio_values": np.where(mask, random.standard_normal((B, S), dtype=np.float32), np.float32(0)),
        "audio_mask": mask,
    }


def _whole(spec: AudioSpec | VideoSpec, random: np.random.Generator, B: int) -> dict[str, NDArray[Any]]:
    """Random values of inputs whose every axis but the batch is fixed."""
    shapes = {
        name: [B, *(axis for axis in shape if isinstance(axis, int))] for name, (_, shape) in spec.tensors.items()
    }
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
