"""What a MoPE graph looks like from outside, in optimum's terms: inputs, axes, outputs, example inputs, tolerance.

Registered with optimum's ``TasksManager`` for the backend ``onnx`` as model type ``mope``, so that tools built on
optimum find it; our own export reads its axes, examples and tolerance from here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator, NormalizedConfig
from tokenizers import Tokenizer

from mope_deploy.model import MoPE

__all__ = [
    "EXAMPLE_BATCH",
    "EXAMPLE_LENGTH",
    "MODEL_TYPE",
    "TASK",
    "MoPEExporterConfig",
    "MoPEGraph",
    "exporter_config",
]

MODEL_TYPE = "mope"
TASK = "visual-question-answering"  # optimum's name for a picture and a text in, class scores out
AXES = {
    "pixel_values": {0: "batch"},
    "input_ids": {0: "batch", 1: "text_length"},
    "attention_mask": {0: "batch", 1: "text_length"},
}
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 7  # different from each other, or the exporter ties their axes


@dataclass(frozen=True)
class MoPEGraph:
    """What an exporter must know of a model, under the attribute names that optimum reads.

    Attributes:
        input_names: inputs of the graph, in order.
        image_size: height and width in pixels; None without an image.
        vocab_size: token ids are below it; None without a text.
        max_length: longest text in tokens; None without a text.
        num_labels: C.
        num_layers: layers of the main encoder.
        num_experts: K.
        routing_output: whether ``routing`` (B, layers, K) is an output.
    """

    input_names: tuple[str, ...]
    image_size: tuple[int, int] | None
    vocab_size: int | None
    max_length: int | None
    num_labels: int
    num_layers: int
    num_experts: int
    routing_output: bool
    num_channels: int = 3
    model_type: str = MODEL_TYPE

    @classmethod
    def of(cls, model: MoPE, *, routing_output: bool = True) -> MoPEGraph:
        """The description of ``model``; models without dynamic prompts have no routing to put out."""
        image, text = model.preprocessing.image, model.preprocessing.text
        return cls(
            input_names=model.input_names,
            image_size=None if image is None else (image.height, image.width),
            vocab_size=_vocab_size(model.preprocessing.tokenizer),
            max_length=None if text is None else text.max_length,
            num_labels=len(model.config.labels),
            num_layers=model.main.depth,
            num_experts=model.config.experts,
            routing_output=routing_output and model.config.dynamic,
        )


class MoPEExporterConfig(ExporterConfig):
    """optimum's description of a MoPE graph; build it from a :class:`MoPEGraph`."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator, DummyTextInputGenerator)
    # Of float32, relative to the largest value of the output.
    ATOL_FOR_VALIDATION = 1e-5

    @property
    def graph(self) -> MoPEGraph:
        """What this describes."""
        return self._config

    @property
    def tolerance(self) -> float:
        """Allowed max|a − b| / max|b| of every output against the eager model."""
        assert isinstance(self.ATOL_FOR_VALIDATION, float)
        return self.ATOL_FOR_VALIDATION

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of every input by name."""
        return {name: dict(AXES[name]) for name in self.graph.input_names}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of every output by name."""
        names = ("logits", "routing") if self.graph.routing_output else ("logits",)
        return {name: {0: "batch"} for name in names}

    @property
    def input_shapes(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """ONNX Runtime's type and the axes of every input by name."""
        sizes: dict[str, tuple[str, tuple[int | str, ...]]] = {
            "input_ids": ("tensor(int64)", ("batch", "text_length")),
            "attention_mask": ("tensor(int64)", ("batch", "text_length")),
        }
        if self.graph.image_size is not None:
            sizes["pixel_values"] = ("tensor(float)", ("batch", self.graph.num_channels, *self.graph.image_size))
        return {name: sizes[name] for name in self.inputs}

    @property
    def output_shapes(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """ONNX Runtime's type and the axes of every output by name."""
        sizes: dict[str, tuple[str, tuple[int | str, ...]]] = {
            "logits": ("tensor(float)", ("batch", self.graph.num_labels)),
            "routing": ("tensor(float)", ("batch", self.graph.num_layers, self.graph.num_experts)),
        }
        return {name: sizes[name] for name in self.outputs}

    @property
    def values_override(self) -> None:
        """Nothing of the model's configuration is changed for the export."""
        return

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        """Random inputs to trace with; ``batch_size`` and ``sequence_length`` may be given."""
        longest = self.graph.max_length or EXAMPLE_LENGTH
        shapes = {"batch_size": EXAMPLE_BATCH, "sequence_length": min(EXAMPLE_LENGTH, longest)} | shapes
        return super().generate_dummy_inputs(framework, **shapes)


TasksManager.create_register("onnx", overwrite_existing=True)(MODEL_TYPE, TASK)(MoPEExporterConfig)


def exporter_config(model: MoPE, *, routing_output: bool = True) -> MoPEExporterConfig:
    """The registered description of ``model``, found the way any tool of optimum finds it."""
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=MODEL_TYPE, task=TASK, library_name="transformers"
    )
    return constructor(MoPEGraph.of(model, routing_output=routing_output))


def _vocab_size(tokenizer: str | None) -> int | None:
    return None if tokenizer is None else Tokenizer.from_str(tokenizer).get_vocab_size()
