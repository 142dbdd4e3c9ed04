"""What a MoPE graph looks like from outside, in optimum's terms: inputs, axes, outputs, example inputs, tolerance.

Registered with optimum's ``TasksManager`` for the backend ``onnx`` as model type ``mope``, so that tools built on
optimum find it; our own export reads its axes, examples and tolerance from here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import (
    DTYPE_MAPPER,
    DummyInputGenerator,
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
    NormalizedConfig,
)

from mope_deploy.model import MoPE
from mope_deploy.preprocess import MODALITIES, AudioSpec, Tensors, VideoSpec, present_name, tensors_of

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
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 7  # different from each other, or the exporter ties their axes


@dataclass(frozen=True)
class MoPEGraph:
    """What an exporter must know of a model, under the attribute names that optimum reads; None without a modality."""

    input_names: tuple[str, ...]  # in the graph's order
    image_size: tuple[int, int] | None  # height and width in pixels
    vocab_size: int | None  # token ids are below it
    max_length: int | None  # longest text in tokens
    num_labels: int  # C
    num_layers: int  # of the main encoder
    num_experts: int  # K
    routing_output: bool  # whether routing (B, layers, K) is an output
    num_channels: int = 3
    model_type: str = MODEL_TYPE
    audio: AudioSpec | None = None
    video: VideoSpec | None = None
    missing: tuple[str, ...] = ()  # modalities that samples may lack

    @property
    def tensors(self) -> Tensors:
        """Every input in the graph's order: name → dtype and axes."""
        made: Tensors = dict.fromkeys(("input_ids", "attention_mask"), ("int64", ("batch", "text_length")))
        if self.image_size is not None:
            made["pixel_values"] = ("float32", ("batch", self.num_channels, *self.image_size))
        made |= {present_name(name): ("int64", ("batch",)) for name in self.missing}
        made |= tensors_of({name: spec for name, spec in (("audio", self.audio), ("video", self.video)) if spec})
        return {name: made[name] for name in self.input_names}

    @classmethod
    def of(cls, model: MoPE, *, routing_output: bool = True) -> MoPEGraph:
        """The description of ``model``; models without dynamic prompts have no routing to put out."""
        made = model.preprocessing
        return cls(
            input_names=model.input_names,
            image_size=None if made.image is None else (made.image.height, made.image.width),
            vocab_size=model.vocabulary,
            max_length=None if made.text is None else made.text.max_length,
            num_labels=len(model.config.labels),
            num_layers=model.main.depth,
            num_experts=model.config.experts,
            routing_output=routing_output and model.config.dynamic,
            audio=made.audio,
            video=made.video,
            missing=made.missing,
        )


class DummyMediaInputGenerator(DummyInputGenerator):
    """Random inputs of the modalities that optimum's own generators do not make in our form."""

    SUPPORTED_INPUT_NAMES = ("audio_", "video_values", *map(present_name, MODALITIES))

    def __init__(
        self, task: str, normalized_config: NormalizedConfig, *, batch_size: int = EXAMPLE_BATCH, **shapes: Any
    ) -> None:
        self.task, self.graph = task, normalized_config.config
        self.sizes, audio = {"batch": batch_size}, self.graph.audio
        if audio is not None:  # enough for a few frames, and a size that no other axis has
            short = min(audio.max_samples, 5 * audio.min_samples + 3)
            self.sizes["audio_length"] = shapes.get("audio_length") or short

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        """Values of the standard normal distribution; masks without padding; nothing missing."""
        dtype, shape = self.graph.tensors[input_name]
        sizes = [self.sizes[axis] if isinstance(axis, str) else axis for axis in shape]
        if dtype == "int64":
            int64 = (DTYPE_MAPPER.pt if framework == "pt" else DTYPE_MAPPER.np)(dtype)
            return self.constant_tensor(sizes, value=1, dtype=int64, framework=framework)
        return self.random_float_tensor(sizes, -2.0, 2.0, framework=framework, dtype=float_dtype)


class MoPEExporterConfig(ExporterConfig):
    """optimum's description of a MoPE graph; build it from a :class:`MoPEGraph`."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    # Of float32, relative to the largest value of the output.
    ATOL_FOR_VALIDATION = 1e-5

    @property
    def DUMMY_INPUT_GENERATOR_CLASSES(self) -> tuple[type, ...]:
        """One for each kind of input there is: optimum's own ask for a vocabulary even without a text."""
        found = {"pixel_values": DummyVisionInputGenerator, "input_ids": DummyTextInputGenerator}
        return (*(cls for name, cls in found.items() if name in self.graph.input_names), DummyMediaInputGenerator)

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
        return {
            name: {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}
            for name, (_, shape) in self.graph.tensors.items()
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of every output by name."""
        return {name: {0: "batch"} for name in self.output_shapes}

    @property
    def input_shapes(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """ONNX Runtime's type and the axes of every input by name."""
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        return {name: (types[dtype], shape) for name, (dtype, shape) in self.graph.tensors.items()}

    @property
    def output_shapes(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """ONNX Runtime's type and the axes of every output by name."""
        shapes: dict[str, tuple[int | str, ...]] = {"logits": ("batch", self.graph.num_labels)}
        if self.graph.routing_output:
            shapes["routing"] = ("batch", self.graph.num_layers, self.graph.num_experts)
        return {name: ("tensor(float)", shape) for name, shape in shapes.items()}

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
