"""What is compared with what: an entry for each command, all of them measured by :mod:`benchmarks.ratios`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.settings import TEXT_LENGTH, Spec

__all__ = ["COMPARISONS", "Comparison", "Group"]


@dataclass(frozen=True)
class Group:
    """What is timed in turn."""

    graphs: Mapping[str, Spec]  # by name in the table; ratios are to the first
    batches: Mapping[int, str | None]  # batch size → the target that it is about, or None
    cells: tuple[str, ...] = ()  # of the columns before the names; an encoder's kind is shown by its name
    judged: tuple[str, ...] = ()  # graphs that the targets are about, by default all but the first; the least counts


@dataclass(frozen=True)
class Comparison:
    """One command.

    In what it is ``about``, ``{vit}``, ``{text}``, ``{form}`` and ``{int8}`` stand for the encoders' names, the form of
    MoPE's layers and the CPU's int8 instructions.
    """

    help: str
    about: str  # what the figures mean
    title: str  # of the table
    columns: tuple[str, ...]  # before the times: the groups' cells, batch if sizes vary, the graphs' names
    base: str  # what the first graph of every group is called in the last column
    groups: tuple[Group, ...]
    text_length: int = TEXT_LENGTH  # tokens
    sizes: bool = False  # whether the files' sizes are shown
    needs_int8: bool = False  # whether the target is about CPUs with int8 dot products alone


def _pair(image: str, precision: str = "fp32") -> dict[str, Spec]:
    return {
        "bare pair": Spec(kind="bare", image=image, precision=precision),
        "MoPE": Spec(image=image, precision=precision),
    }


COMPARISONS = {
    "fp32-ratio": Comparison(
        help="Exported MoPE ÷ bare encoder pair, fp32, batch 1 and 8.",
        about="The exported MoPE ({form} form, K=16, L=6, dense routing) ÷ the same two encoders without prompts and "
        f"with a linear head; {{text}}, {TEXT_LENGTH} tokens, ONNX Runtime fp32.",
        title="fp32",
        columns=("image encoder", "batch", "graph"),
        base="bare",
        groups=tuple(
            Group(_pair(image), {batch: f"fp32-{image}-{batch}" for batch in (1, 8)}, cells=(image,))
            for image in ("vit", "swin")
        ),
        sizes=True,
    ),
    "text-main": Comparison(
        help="Prompted BERT with its image feature given ÷ bare BERT.",
        about="{text} as the main encoder, prompted in every layer ({form} form, K=16, L=6), given y of the image and "
        "all that depends on y alone, ÷ the same encoder alone with a linear head; 16 tokens.",
        title="text as main",
        columns=("batch", "graph"),
        base="bare",
        groups=(
            Group(
                {"bare BERT": Spec(kind="bare-main", main="text"), "MoPE, y given": Spec(kind="given-y", main="text")},
                {1: "text-main", 8: None},
            ),
        ),
        text_length=16,
    ),
    "cached-y": Comparison(
        help="MoPE with its text feature given ÷ image encoder alone.",
        about="{vit} prompted in every layer ({form} form, K=16, L=6), given y of the text and all that depends on y "
        "alone, ÷ the same encoder alone with a linear head; batch 1. The whole model is shown beside them.",
        title="cached y",
        columns=("graph",),
        base="main encoder",
        groups=(
            Group(
                {"main encoder": Spec(kind="bare-main"), "MoPE, y given": Spec(kind="given-y"), "whole MoPE": Spec()},
                {1: "cached-y"},
                judged=("MoPE, y given",),
            ),
        ),
    ),
    "int8-ratio": Comparison(
        help="Exported MoPE ÷ bare encoder pair, both in int8.",
        about="The exported MoPE ({form} form, K=16, L=6) ÷ its bare encoder pair, both quantised by the project's own "
        "lowering; batch 1. Static int8 is calibrated on random inputs, which no speed depends on.",
        title="int8",
        columns=("image encoder", "precision", "graph"),
        base="bare",
        groups=tuple(
            Group(_pair(image, precision), {1: target}, cells=(image, precision))
            for image in ("vit", "swin")
            for precision, target in (("int8-dynamic", f"int8-{image}"), ("int8", None))
        ),
        sizes=True,
    ),
    "int8-speed": Comparison(
        help="Exported MoPE in int8 ÷ in fp32.",
        about="The exported MoPE with {vit} ({form} form, K=16, L=6) at each precision ÷ itself in fp32, batch 1. This "
        "CPU's int8 instructions: {int8}.",
        title="int8 against fp32",
        columns=("precision",),
        base="fp32",
        groups=(Group({name: Spec(precision=name) for name in ("fp32", "int8-dynamic", "int8")}, {1: "int8-speed"}),),
        needs_int8=True,
    ),
    "experts-ratio": Comparison(
        help="K = 256 ÷ K = 16, top-1 and soft.",
        about="The exported MoPE with {vit} ({form} form, L=6), batch 1, fp32.",
        title="experts",
        columns=("routing", "K"),
        base="K=16",
        groups=tuple(
            Group(
                {f"K={experts}": Spec(experts=experts, top_k=top_k) for experts in (16, 256)},
                {1: f"experts-{routing}"},
                cells=(routing,),
            )
            for routing, top_k in (("top1", 1), ("soft", 0))
        ),
    ),
    "eager-ratio": Comparison(
        help="Exported MoPE ÷ eager PyTorch.",
        about="The exported MoPE with {vit} (K=16, L=6) in ONNX Runtime ÷ the same model in eager PyTorch, both in "
        "this process with the same number of threads; batch 1, fp32.",
        title="exported against eager",
        columns=("",),
        base="eager",
        groups=(Group({"eager": Spec(eager=True), "exported": Spec()}, {1: "eager-ratio"}),),
    ),
}
