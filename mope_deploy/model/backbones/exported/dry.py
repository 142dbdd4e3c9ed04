"""Whether an encoder that is run as a whole can be traced into a graph, asked before it is trained around.

Of encoders that no family knows layer by layer some cannot be exported: they branch on values, as Longformer does, pick
rows by values, or call kernels that no graph has. An export would say so, hours later. Architectures of which graphs
were made are listed; any other is traced once, when it is loaded, which takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mope_deploy.errors import ConfigError
from mope_deploy.files import reason
from mope_deploy.model.quiet import quiet

__all__ = ["check_traceable"]

# Seen to export: `model_type` of transformers' configurations, modules of timm's architectures.
# fmt: off
_SEEN = frozenset((
    "albert", "apertus", "arcee", "bert-generation", "bloom", "clip_text_model", "data2vec-text", "deberta",
    "ernie", "esm", "eurobert", "falcon", "flaubert", "gpt2", "gpt_neox", "ibert", "jina_embeddings_v3", "llama",
    "markuplm", "megatron-bert", "nomic_bert", "opt", "phi", "rembert", "roberta-prelayernorm", "roformer",
    "splinter", "xlm", "xlm-roberta-xl", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit",
    "regnet", "resnet", "swin", "swinv2", "vit", "timm.models.cait", "timm.models.convit", "timm.models.convmixer",
    "timm.models.convnext", "timm.models.cpubone", "timm.models.resnet",
))
# What these make has a shape that depends on values, or none of the targets takes them.
_REFUSED = (
    "masked_select", "nonzero", "unique", "unique_dim", "_unique2", "unique_consecutive", "scatter_reduce",
    "index_reduce", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "_fft_r2c", "_fft_c2c", "_fft_c2r",
    "fft_rfft", "fft_fft", "fft_fft2", "fft_fftn", "fft_rfft2", "bernoulli", "multinomial", "randn", "rand",
)
# fmt: on
_NAMESPACES = ("aten", "prim", "prims", "_operator", "math")


def check_traceable(module: nn.Module, run: Callable[..., Tensor], examples: Mapping[str, Tensor], source: str) -> None:
    """Raise unless ``run`` with ``module`` can be traced, for batches and texts of any size.

    Args:
        module: the library's encoder.
        run: from inputs by name to what is read of its outputs.
        examples: inputs of ``run``, whose first axis varies, and of integers (texts) the second.
        source: of the encoder, for messages.

    Raises:
        ConfigError: naming what cannot be traced.
    """
    config = getattr(module, "config", None)
    if {getattr(config, "model_type", None), type(module).__module__} & _SEEN:
        return
    axes = {
        name: dict.fromkeys(range(1 if tensor.is_floating_point() else 2), Dim.DYNAMIC)
        for name, tensor in examples.items()
    }
    try:
        # Errors too: where the exporter fails it writes the whole graph out as one.
        with torch.no_grad(), quiet(level=logging.CRITICAL):
            program = torch.export.export(_Whole(module, run), (), dict(examples), dynamic_shapes={"inputs": axes})
        found = sorted(set(_refused(program.graph_module)))
        why = f"it calls {', '.join(found[:3])}" if found else None
    except Exception as error:  # the exporter raises many classes, all meaning that it cannot
        why = f"{type(error).__name__}: {reason(error)}"
    if why is not None:
        raise ConfigError(
            f"{source} cannot be exported: {why}",
            received=type(module).__name__,
            expected="an encoder whose computation does not depend on values, of standard operators",
        )


class _Whole(nn.Module):
    def __init__(self, encoder: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder, self.run = encoder, run

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.run(**inputs)


def _refused(graph: Any) -> Iterator[str]:
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        space = getattr(target, "namespace", None) or getattr(target, "__module__", "")
        name = str(getattr(target, "_opname", getattr(target, "__name__", target)))
        if space not in _NAMESPACES or name.rstrip("_") in _REFUSED:
            yield f"{space}.{name}"
