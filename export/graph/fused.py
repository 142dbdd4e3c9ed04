"""A variant for ONNX Runtime alone: attention, normalisation and GELU fused into its own operators.

The raw graph stays the canonical one. The variant reads the same external data; what fusing adds of its own is small
and lies in its own file. The fusions are onnxscript's: ONNX Runtime's own optimiser never matches the attention of
graphs from torch's dynamo exporter, and says nothing. For the same reason the fused attentions are counted here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from export.graph.files import external_weights
from export.graph.naming import renumber
from mope_deploy.errors import ExportError
from mope_deploy.model import MoPE

__all__ = ["attention_layers", "fuse", "routers"]

_ATTENTION = ("Attention", "MultiHeadAttention")
_OWN_DATA_LIMIT = 0.05  # of the shared data; more means that fusing copied weights


def attention_layers(model: MoPE) -> int:
    """Layers of every encoder that reaches the logits; each has one attention (a pooling head may add one more)."""
    conditioned = model.config.dynamic or model.config.mapped
    encoders: list[Any] = list(model.complementary.values()) if conditioned else []
    return model.main.depth + sum(encoder.backbone.depth for encoder in encoders)


def routers(model: MoPE) -> int:
    """Routers of a graph of ``model``: the only softmaxes that are no attention."""
    return model.main.depth if model.config.dynamic else 0


def fuse(raw: Path, fused: Path, *, layers: int, routers: int) -> Counter[str]:
    """Write the fused variant of a graph with external data.

    Args:
        raw: the canonical graph, its weights in a ``.data`` file beside it.
        fused: the file to write, in the same folder.
        layers: from :func:`attention_layers`; at least so many attentions must be fused.
        routers: from :func:`routers`; no other softmax may be left over.

    Returns:
        How many nodes of each of ONNX Runtime's own operators the variant has.

    Raises:
        ExportError: not every attention was fused, or the variant does not share its weights.
    """
    assert raw.parent == fused.parent
    try:
        model, _ = optimize_for_ort(ir.load(raw), clear_metadata=True)
    except Exception as error:  # onnxscript's rewriter raises many classes
        raise ExportError(
            f"fusing failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            todo="export without --fuse: the canonical graph does not need it",
        ) from error
    own = Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")
    found = sum(own[op] for op in _ATTENTION)
    left = sum(node.op_type == "Softmax" for node in model.graph) - routers
    if found < layers or left != 0:
        raise ExportError(
            "fusing for ONNX Runtime did not find every attention layer",
            received=f"{found} fused and {left} left",
            expected=f"at least {layers}, one for each layer of the encoders, and none left",
            todo="export without --fuse: these encoders are not of a shape that it knows",
        )
    renumber(model)
    ir.save(model, fused)
    _check_shared(fused, raw)
    return own


def _check_shared(fused: Path, raw: Path) -> None:
    data = raw.with_name(raw.name + ".data")
    places = {str(tensor.location) for tensor in external_weights(fused).values()}
    own, shared = fused.stat().st_size, data.stat().st_size
    graph = raw.stat().st_size
    if places != {data.name} or own > graph + max(_OWN_DATA_LIMIT * shared, 2**16):
        raise ExportError(
            f"{fused.name} does not share the weights of {raw.name}",
            received=f"{own:,} bytes of its own, data in {', '.join(sorted(places)) or 'itself'}",
            expected=f"data in {data.name}",
        )
