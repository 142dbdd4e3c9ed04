"""What a built engine really computes in, as TensorRT's engine inspector reports it.

The types of the parsed network (worker.py) say what was asked for; the inspector says what the compiler made of it. Its
JSON is documented in examples only and differs between releases: layers are objects where the engine was built with
detailed profiling verbosity, else names; a type is a word (``Half``) or a sentence (``Row major linear FP16 format``).
What cannot be read counts as not told, never as proof of anything.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mope_deploy.errors import EngineError

__all__ = ["check_precision", "read_precisions"]

# What makes a layer a matrix product or a convolution: its type, its kernel, or the ONNX operators it is named after.
# Modules are part of such a name, so "attention" there says nothing.
_KIND = re.compile(
    r"gemm|gemv|matmul|matrix_?multiply|mha|attention|conv(?!er)|fprop|fully_?connected|cutlass", re.IGNORECASE
)
_NAME = re.compile(r"gemm|matmul|_mha|/conv\b|\bconv_", re.IGNORECASE)
_COPY = re.compile(r"reformat|copynode|shuffle|shape", re.IGNORECASE)  # named after a product, and none themselves
# Narrowest first: a product reads its narrow operands; a wider tensor beside them is a bias or a residual.
_TYPES = (
    ("int8", re.compile(r"\b(int8|i8)\b", re.IGNORECASE)),
    ("float8", re.compile(r"\b(fp8|e4m3|e5m2)", re.IGNORECASE)),
    ("bfloat16", re.compile(r"\b(bf16|bfloat16|bfloat)\b", re.IGNORECASE)),
    ("float16", re.compile(r"\b(half|fp16|float16|f16)\b", re.IGNORECASE)),
    ("float32", re.compile(r"\b(float|fp32|float32|f32|tf32)\b", re.IGNORECASE)),
)
# A kernel's name has both operands' types: sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_…
_KERNEL = re.compile(r"_(i8|e4m3|bf16|f16|f32|tf32)\1_")
_DECLARED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


def read_precisions(engine_information: str) -> Counter[str]:
    """Types that an engine's matrix products and convolutions compute in.

    Args:
        engine_information: JSON of ``EngineInspector.get_engine_information``, of TensorRT 10, 11 or RTX.

    Returns:
        dtype → number of such layers whose type is told; empty where none is: names alone, or no JSON that we know.
    """
    found: Counter[str] = Counter()
    for layer in _layers(engine_information):
        kernel, name = str(layer.get("TacticName", "")), str(layer.get("Name", ""))
        kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"
        if _COPY.search(kind) or name.startswith("Reformat"):
            continue
        if not (_KIND.search(kind) or _KIND.search(kernel) or _NAME.search(name)):
            continue
        told = _KERNEL.search(kernel)
        if (dtype := _type([told[1]] if told else _operands(layer))) is not None:
            found[dtype] += 1
    return found


def check_precision(found: Mapping[str, int], declared: str, what: str) -> None:
    """An engine has matrix layers of the precision that it is called by.

    Not all of them: layers may have been kept in a higher precision on purpose, and attention products always are.

    Args:
        found: from :func:`read_precisions`; nothing is concluded where it is empty.
        declared, what: the graph's precision in the manifest, and the engine's file.

    Raises:
        EngineError: none of them is.
    """
    wanted = _DECLARED.get(declared)
    if wanted is None or not found or found.get(wanted):
        return
    counts = ", ".join(f"{count} of {dtype}" for dtype, count in sorted(found.items()))
    raise EngineError(
        f"{what} is called {declared} and computes in something else",
        received=f"matrix layers: {counts}",
        expected=f"some of {wanted}",
        todo="build it again, with another release of the library if it stays so",
    )


def _layers(text: str) -> Iterator[Mapping[str, Any]]:
    """The layers that are described, not only named."""
    try:
        document = json.loads(text, strict=False)  # some releases leave control characters in metadata as they are
    except (ValueError, RecursionError):
        return
    yield from _objects(document.get("Layers") if isinstance(document, dict) else None)


def _operands(layer: Mapping[str, Any]) -> list[str]:
    """What is told of the types of inputs and weights."""
    told = [str(one.get("Format/Datatype", one.get("Datatype", ""))) for one in _objects(layer.get("Inputs"))]
    return told + [str(one.get("Type", "")) for one in _objects([layer.get("Weights")])]


def _type(told: Sequence[str]) -> str | None:
    """The narrowest."""
    return next((name for name, words in _TYPES if any(words.search(text) for text in told)), None)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
