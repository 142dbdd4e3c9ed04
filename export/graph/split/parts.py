"""Cutting a finished graph: what a part is, and what is written.

A part computes its modality's y and all that depends on that modality alone: mapped tokens, the routers' share of y,
prompts that y alone chooses. What the main file needs of that leaves as one row for each sample. So a device that is
asked one question about many pictures runs the question's part once.

The cut is made in the graph as it was judged, of any precision: every node stays what it is. Where it goes follows from
what depends on what (``sides.py``); what crosses is chosen small (``cut.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.graph.files import save
from export.graph.split.cut import Cut, Feeds
from export.graph.split.sharing import places_in_pieces, write_sharing
from mope_deploy.model import MoPE
from mope_deploy.preprocess import present_name

__all__ = ["PartFile", "SplitGraph", "part_inputs", "split"]


@dataclass(frozen=True)
class PartFile:
    """The file of one complementary modality."""

    modality: str
    files: tuple[Path, ...]  # the ONNX file and, where they are apart, its weights
    inputs: tuple[str, ...]  # names of what it reads
    y_width: int  # D_y
    width: int  # F, how many values it hands to the main file for each sample


@dataclass(frozen=True)
class SplitGraph:
    """A graph in several files."""

    main: tuple[Path, ...]  # the ONNX file and, where they are apart, its weights
    parts: tuple[PartFile, ...]  # in the order of the modalities

    @property
    def part_files(self) -> tuple[Path, ...]:
        """The ONNX file of each part."""
        return tuple(part.files[0] for part in self.parts)


def split(
    source: Path,
    folder: Path,
    inputs: Mapping[str, Sequence[str]],
    probes: Sequence[Feeds],
    *,
    external: bool = False,
    extra_ops: Collection[str] = (),
    weights_of: tuple[Path, SplitGraph] | None = None,
) -> SplitGraph:
    """Cut a graph.

    Args:
        source: the whole graph; the pooled features in it are called ``y_<modality>``, as
            :func:`export.graph.to_onnx.trace` has them.
        folder: where the files go, ``model.onnx`` and ``model.<modality>.onnx`` where the source is ``model.onnx``; not
            the source's own.
        inputs: by complementary modality the names of its inputs; all others are the main one's.
        probes: at least two batches of all inputs, of different sizes in every axis that varies: what crosses must have
            the batch as its first axis and no other one that varies.
        external: put the weights beside each file, whatever their size.
        extra_ops: operators that a file for ONNX Runtime alone may hold as well.
        weights_of: a graph whose external weights the source reads, and what it was cut into, in the same folder: the
            files read the weights of that. They are for ONNX Runtime alone and not linted.

    Raises:
        ExportError: the graph cannot be cut so that float32 rows, one for each sample, are all that crosses.
    """
    cut = Cut(source, inputs)
    crossing = {modality: cut.crossing(modality, probes) for modality in inputs}
    places = None
    if weights_of is not None:
        whole, pieces = weights_of
        places = places_in_pieces(whole, (pieces.main[0], *pieces.part_files))

    def write(model: ir.Model, name: str) -> tuple[Path, ...]:
        if places is not None:
            return write_sharing(model, folder / name, places)
        if not external:
            ir.external_data.load_to_model(model)  # no file may lean on the weights of the whole one
        return tuple(save(model, folder / name, external=external, extra_ops=extra_ops))

    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for modality, values in crossing.items():
        y = cut.pooled(modality, probes)
        files = write(cut.part(modality, y, values), f"{source.stem}.{modality}.onnx")
        parts.append(PartFile(modality, files, tuple(inputs[modality]), y.size, sum(value.size for value in values)))
    return SplitGraph(write(cut.main(crossing), source.name), tuple(parts))


def part_inputs(model: MoPE) -> dict[str, tuple[str, ...]]:
    """By complementary modality the names of the inputs that its part reads."""
    return {
        name: (*encoder.backbone.input_names, *((present_name(name),) if name in model.stand_ins else ()))
        for name, encoder in model.complementary_encoders().items()
    }
