"""A model that looks its outputs up, and a graph that looks them up elsewhere: any two answers can be compared.

Sample i is the text ``w{i}``; both sides read row i of their own tables.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from export.gate import Evaluation, PrecisionReport, Thresholds, measure_precision
from export.graph.exporter_config import TASK, MoPEExporterConfig, MoPEGraph
from mope_deploy.data import Sample
from mope_deploy.model import MoPEOutput
from mope_deploy.preprocess import Preprocessing, TextSpec
from mope_deploy.task import TASKS

N, C, LAYERS, K = 83, 4, 3, 5  # 1 + 3 + 4·16 + 15: the last batch is a part of one
ANYTHING = Thresholds(labels=0.0, routing=0.0, metric=1.0)


class Table(nn.Module):
    """The eager side.

    Args:
        logits: (n, C).
        soft: routing weights before selection (n, layers, K), or None.
        top_k: of the routing.
        multi_label: whether each logit is an answer of its own.
    """

    def __init__(
        self, logits: np.ndarray, soft: np.ndarray | None = None, *, top_k: int = 0, multi_label: bool = False
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits.astype(np.float32)))
        self.soft = None if soft is None else torch.from_numpy(soft.astype(np.float32))
        self.routing = None if soft is None else torch.from_numpy(select(soft, top_k).astype(np.float32))
        self.config = SimpleNamespace(
            labels=tuple("abcdefgh"[: logits.shape[1]]),
            dynamic=soft is not None,
            top_k=top_k,
            experts=0 if soft is None else soft.shape[2],
        )
        self.task = TASKS["multi-label" if multi_label else "single-label"](labels=self.config.labels)
        words = {f"w{i}": i for i in range(len(logits))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.preprocessing = Preprocessing(
            image=None, text=TextSpec(max_length=4, pad_id=0), tokenizer=tokenizer.to_str()
        )
        self.input_names = ("input_ids", "attention_mask")
        self.layers = ()  # no experts: the tables are all there is
        self.calls = 0

    def forward(self, inputs: dict[str, Tensor], *, form: str) -> MoPEOutput:
        assert form == "token", "the reference is the definition"
        self.calls += 1
        rows = inputs["input_ids"][:, 0]
        if self.soft is None or self.routing is None:
            return MoPEOutput(self.logits[rows], None, None)
        return MoPEOutput(self.logits[rows], self.routing[rows], self.soft[rows])

    def describe(self, *, routing: bool | None = None) -> MoPEExporterConfig:
        layers, experts = (1, 1) if self.soft is None else self.soft.shape[1:]
        graph = MoPEGraph(
            input_names=self.input_names,
            image_size=None,
            vocab_size=len(self.logits),
            max_length=4,
            num_labels=self.logits.shape[1],
            num_layers=layers,
            num_experts=experts,
            routing_output=self.config.dynamic if routing is None else routing,
        )
        return MoPEExporterConfig(graph, TASK)


def select(soft: np.ndarray, top_k: int) -> np.ndarray:
    """Top-k routing weights of (n, layers, K), by loops."""
    if not top_k:
        return soft
    hard = np.zeros_like(soft)
    for row in range(soft.shape[0]):
        for layer in range(soft.shape[1]):
            chosen = sorted(range(soft.shape[2]), key=lambda k: -soft[row, layer, k])[:top_k]
            for k in chosen:
                hard[row, layer, k] = soft[row, layer, k] / sum(soft[row, layer, c] for c in chosen)
    return hard


def write_table(path: Path, logits: np.ndarray, routing: np.ndarray | None = None) -> Path:
    """The graph's side: ``logits`` (n, C) and ``routing`` (n, layers, K), after selection."""
    outputs = {"logits": logits} | ({} if routing is None else {"routing": routing})
    nodes = [
        helper.make_node("Gather", ["input_ids", "zero"], ["rows"], axis=1),
        *(helper.make_node("Gather", [f"{name}.table", "rows"], [name], axis=0) for name in outputs),
    ]
    tokens = ["batch", "text_length"]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *array.shape[1:]])
            for name, array in outputs.items()
        ],
        [
            numpy_helper.from_array(np.array(0), "zero"),
            *(numpy_helper.from_array(array.astype(np.float32), f"{name}.table") for name, array in outputs.items()),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def table_samples(labels: list[Any]) -> list[Sample]:
    return [
        Sample(image=None, text=f"w{i}", label=label, line=i + 1, source=Path("/somewhere/rows.jsonl"))
        for i, label in enumerate(labels)
    ]


def compare(
    model: Table,
    path: Path,
    labels: list[Any],
    *,
    logits: np.ndarray,
    routing: np.ndarray | None = None,
    thresholds: Thresholds = ANYTHING,
    **arguments: Any,
) -> PrecisionReport:
    """The gate's report on a graph with these tables; as JSON it is checked to be JSON."""
    evaluation = Evaluation(model, table_samples(labels))  # type: ignore[arg-type]
    file = write_table(path / "table.onnx", logits, routing)
    config = model.describe(routing=routing is not None)
    report = measure_precision(evaluation, file, config, precision="int8", thresholds=thresholds, **arguments)
    json.dumps([report.to_dict(), report.figures()], allow_nan=False)
    return report


def weights(random: np.random.Generator, n: int = N) -> np.ndarray:
    """Routing weights (n, layers, K); rows sum to 1."""
    raw = np.exp(2 * random.standard_normal((n, LAYERS, K)))
    return (raw / raw.sum(axis=-1, keepdims=True)).astype(np.float32)


def nudged(random: np.random.Generator, soft: np.ndarray, by: float = 0.3) -> np.ndarray:
    """Other weights, near enough for most top experts to stay."""
    raw = soft * np.exp(by * random.standard_normal(soft.shape))
    return (raw / raw.sum(axis=-1, keepdims=True)).astype(np.float32)


def best(values: np.ndarray) -> int:
    """argmax by a loop: the first of equals."""
    found = 0
    for i in range(1, len(values)):
        if values[i] > values[found]:
            found = i
    return found


def names(n: int, classes: int = C) -> list[Any]:
    return ["abcd"[i % classes] for i in range(n)]


def shown(report: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(report.table())
    return text.getvalue()
