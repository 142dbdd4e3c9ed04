"""What conditioning costs on a GPU: MoPE against its own two frozen encoders with a linear head, eager and compiled.

    python -m benchmarks.gpu [--batch 1,8] [--autocast none|bf16|fp16] [--seconds 5] [--json FILE]
    python -m benchmarks.gpu --device cpu --quick --no-compile     # shows that it runs, measures nothing of interest

ViT-B/16 and BERT-base with random weights, 32 tokens: no downloads, and speed does not depend on the values. The bare
pair runs the same encoder modules without prompts. All variants are called in turn in one process, each call
synchronised, so that a slow spell of the machine meets all of them; the ratio of medians is the figure to quote.
Products of float32 are not rounded to TF32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from benchmarks.machine import describe_machine
from mope_deploy.bench.timing import interleave, warm_up
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import UsageError
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig
from mope_deploy.model.backbones import FrozenEncoder
from mope_deploy.model.backbones.bert import BertEncoder
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.vit import ViTEncoder
from mope_deploy.model.build import assemble
from mope_deploy.preprocess import ImageSpec, Preprocessing, TextSpec

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WARM_UP = 10
_TEXT_LENGTH = 32
_AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUICK = {"depth": 2, "width": 64, "heads": 4, "vocabulary": 100}
_REAL = {"depth": 12, "width": 768, "heads": 12, "vocabulary": 30_522}


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    autocast: Annotated[str, typer.Option(help="none, bf16 or fp16.")] = "none",
    experts: Annotated[int, typer.Option(min=1, help="K.")] = 16,
    top_k: Annotated[int, typer.Option(min=0, help="0 for dense routing.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each batch size.")] = 5.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also measure torch.compile.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers of width 64: to see that it runs.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Measure eager and compiled MoPE and the bare encoder pair, interleaved."""
    batches = _batches(batch)
    if device not in ("cuda", "cpu"):
        raise UsageError("--device", received=device, expected="cuda or cpu")
    if autocast not in _AUTOCAST:
        raise UsageError("--autocast", received=autocast, expected=" or ".join(_AUTOCAST))
    if autocast == "fp16" and device == "cpu":
        raise UsageError("--autocast fp16 needs a GPU", todo="use bf16 or none on a CPU")
    if top_k > experts:
        raise UsageError("--top-k", received=top_k, expected=f"at most --experts {experts}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU here", todo="add --device cpu to see that it runs")
    figures = measure(
        device,
        batches,
        autocast=autocast,
        experts=experts,
        top_k=top_k,
        seconds=seconds,
        compiled=compiled,
        quick=quick,
    )
    if to is not None:
        to.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    out.print(figures["machine"]["gpu"] or figures["machine"]["cpu"], markup=False)
    for row in figures["rows"]:
        text = f"batch {row['batch']:<4} {row['name']:<14} p50 {row['p50_ms']:.2f} ms   p95 {row['p95_ms']:.2f} ms"
        out.print(text + (f"   ÷ bare {row['ratio_to_bare']:.3f}" if "ratio_to_bare" in row else ""), markup=False)


def measure(
    device: str,
    batches: list[int],
    *,
    autocast: str,
    experts: int,
    top_k: int,
    seconds: float,
    compiled: bool,
    quick: bool,
) -> dict[str, Any]:
    """The figures of every variant and batch size, JSON-ready, with the machine they were measured on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = _QUICK if quick else _REAL
    model = make_model(experts=experts, top_k=top_k, **sizes).to(device).eval()
    pair = BarePair(model).to(device).eval()
    variants: dict[str, nn.Module] = {"bare eager": pair, "MoPE eager": model}
    if compiled:
        # Each batch size gets code of its own, compiled in the warm-up.
        for name, module in (("bare compiled", pair), ("MoPE compiled", model)):
            variants[name] = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    dtype = _AUTOCAST[autocast]
    rows = []
    for size in batches:
        err.print(f"batch {size}", markup=False)
        inputs = _inputs(size, sizes["vocabulary"], device)
        calls = {name: _call(variant, inputs, device, dtype) for name, variant in variants.items()}
        warm_up(calls, calls_each=_WARM_UP)
        taken = interleave(calls, seconds=seconds)
        for name, values in taken.items():
            p50, p95 = (float(p) for p in np.percentile(values, [50, 95]))
            row = {"batch": size, "name": name, "p50_ms": p50, "p95_ms": p95, "calls": len(values)}
            kind, _, how = name.partition(" ")
            if kind != "bare":
                row["ratio_to_bare"] = p50 / float(np.median(taken[f"bare {how}"]))
            rows.append(row)
    return {
        "rows": rows,
        "encoders": "two tiny layers each" if quick else "ViT-B/16 and BERT-base, random weights",
        "experts": experts,
        "top_k": top_k,
        "text_length": _TEXT_LENGTH,
        "autocast": autocast,
        "tf32": False,
        "machine": describe_machine() | _describe_gpu(device),
    }


class BarePair(nn.Module):
    """The model's own two frozen encoders without any prompt, and a linear head on both features.

    Args:
        model: whose encoder modules are shared.
    """

    def __init__(self, model: MoPE) -> None:
        super().__init__()
        self.main = model.main
        self.complementary = nn.ModuleList(encoder.backbone for encoder in model.complementary_encoders().values())
        width = model.main.feature_width + sum(encoder.feature_width for encoder in self.complementary)
        self.head = nn.Linear(width, len(model.config.labels))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs by name → logits (B, C)."""
        features = []
        for backbone in (self.main, *self.complementary):
            x, mask = backbone.embed(inputs)
            for i in range(backbone.depth):
                x = backbone.layer(i, x, None, mask)
            features.append(backbone.finish(x, mask))
        return self.head(torch.cat(features, dim=-1))


def make_model(*, experts: int, top_k: int, depth: int, width: int, heads: int, vocabulary: int) -> MoPE:
    """A MoPE over a ViT of 224×224 pixels in patches of 16 and a BERT, random weights throughout."""
    args = {"embed_dim": width, "depth": depth, "num_heads": heads}
    module = timm.create_model("vit_base_patch16_224", num_classes=0, **args)
    image = ViTEncoder.of(LoadedEncoder(module, "", args))
    config = AutoConfig.for_model(
        "bert",
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
    )
    text = BertEncoder(AutoModel.from_config(config, add_pooling_layer=False), max_length=_TEXT_LENGTH)
    mean = (0.5, 0.5, 0.5)
    encoders = {
        "image": FrozenEncoder(image, ImageSpec(224, 224, 224, 224, "center", "bicubic", mean, mean)),
        "text": FrozenEncoder(text, TextSpec(max_length=_TEXT_LENGTH, pad_id=0)),
    }
    for encoder in encoders.values():
        encoder.backbone.requires_grad_(False).eval()
    spec = MoPEConfig(
        main=EncoderSpec(modality="image", source="embedded:random"),
        complementary=(EncoderSpec(modality="text", source="embedded:random", prompts=4),),
        labels=("entailment", "neutral", "contradiction"),
        experts=experts,
        top_k=top_k,
    )
    return assemble(MoPE, spec, encoders, preprocessing=Preprocessing(None, None))


def _batches(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= size <= 4096 for size in found):
        raise UsageError("--batch", received=repr(text[:60]), expected="sizes from 1 to 4,096, like 1,8")
    return found


def _inputs(size: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "pixel_values": torch.randn(size, 3, 224, 224, generator=generator),
        "input_ids": torch.randint(1, vocabulary, (size, _TEXT_LENGTH), generator=generator),
        "attention_mask": torch.ones(size, _TEXT_LENGTH, dtype=torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def _call(variant: nn.Module, inputs: dict[str, Tensor], device: str, dtype: torch.dtype | None) -> Callable[[], None]:
    def call() -> None:
        context: AbstractContextManager[Any] = nullcontext() if dtype is None else torch.autocast(device, dtype)
        with torch.inference_mode(), context:
            variant(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _describe_gpu(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"gpu": None}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "cuda": torch.version.cuda}


if __name__ == "__main__":
    raise SystemExit(run_app(app))
