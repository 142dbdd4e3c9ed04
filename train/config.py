"""A recipe: everything that `python -m train` can be told, as typed values (docs/training.md).

Nothing here imports torch, so that a mistake in a recipe is reported at once. Defaults are the paper's recipe
(arXiv 2403.10568, implementation details) where it has one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mope_deploy.model import MoPEConfig
from mope_deploy.model.strict import Listed, Strict

__all__ = ["ColumnsSection", "DataSection", "OptimSection", "Recipe", "RunSection", "TrainSection"]

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
Real = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[
    tuple[Fraction, Fraction], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


class ColumnsSection(Strict):
    """Which columns of a hub data set hold what."""

    image: str = "image"
    text: str = "text"
    label: str = "label"


class DataSection(Strict):
    """Where the samples come from: exactly one of ``name``, ``train`` (files) or ``hub``."""

    name: Literal["digits-ve"] | None = None
    """A data set that this project generates."""
    root: str | None = None
    """Folder of the generated (``name``) or fetched (``hub``) data; null for ``data/<name>``."""
    seed: Count = 0
    """Seed of the generated data, not of training."""
    train_pairs: Positive = 20_000
    """Training pairs to generate."""

    hub: str | None = None
    """Hub id, or local folder, of a data set that Hugging Face ``datasets`` reads."""
    hub_config: str | None = None
    """Its configuration, if it has several."""
    columns: ColumnsSection = ColumnsSection()

    train: str | None = None
    """JSONL file of the training rows; with ``hub``, the name of the split (null for ``train``)."""
    validation: str | None = None
    """The same for validation; null holds out a part of the training rows."""
    test: str | None = None
    """The same for test; null evaluates on validation, and says so."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """How much of the training pictures is held out where there is no validation split."""

    skip_bad: bool = False
    """Skip rows that cannot be used, count and list them, instead of stopping at the first."""
    check_images: bool = True
    """Decode every image, sound and video once before training; false for data too large for that."""
    image_cache_mb: Count = 1024
    """Memory for decoded images and clips as encoders read them, in MiB; those beyond it are decoded every epoch."""
    group_by: str | None = None
    """A further field of the rows, for instance ``template``: accuracy is also reported for each of its values."""
    workers: Count = 0
    """Processes that prepare batches; 0 prepares them in the training process, best where the image cache suffices."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        named = [key for key in ("name", "hub") if getattr(self, key)]
        if not named and self.train:
            named = ["train"]
        if len(named) != 1:
            given = " and ".join(f"data.{key}" for key in named) or "none"
            raise ValueError(f"received {given}, expected one of data.name, data.train (a file) and data.hub")
        if self.name and (self.train or self.validation or self.test):
            raise ValueError(
                f"data.name={self.name} brings its own splits; drop data.train, data.validation, data.test"
            )
        return self


class OptimSection(Strict):
    """AdamW, its learning rates and their schedule."""

    lr_main: PositiveReal = 4e-4
    """Peak learning rate of the main side: prompts, experts, routers, mappers, head."""
    lr_complementary: PositiveReal = 5e-4
    """Peak learning rate of the static prompts inside the complementary encoders."""
    weight_decay: Real = 1e-3
    """Of prompts, experts and weight matrices; never of biases, norms and routing embeddings."""
    betas: Pair = (0.9, 0.999)
    eps: PositiveReal = 1e-8
    clip: Real = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: Listed[Real] = (3, 6)
    """Epochs after which ``multistep`` multiplies the learning rates by ``gamma``."""
    gamma: PositiveReal = 0.4
    warmup_steps: Count = 0
    """Optimiser steps of linear warm-up, under every schedule."""


class TrainSection(Strict):
    """The training loop."""

    epochs: Positive = 10
    max_steps: Positive | None = None
    """Stop after so many optimiser steps, whatever ``epochs`` says."""
    batch_size: Positive = 32
    """Samples of one optimiser step, over all processes and accumulation steps together."""
    accumulation: Positive = 1
    """Parts that a batch is computed in, to save memory."""
    bucket_by_length: bool | Literal["auto"] = "auto"
    """Batches of texts that are about as long; auto: where the text encoder is the main one or carries prompts."""
    eval_batch_size: Positive = 128
    """Samples of one evaluation step and process."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the encoders' arithmetic in training; weights and evaluation on the test split are fp32."""
    importance_weight: Real = 0.01
    """Weight of the importance loss."""
    importance_threshold: Real = 0.1
    """γ: squared coefficients of variation up to it cost nothing."""
    cache_y: bool = True
    """Compute y once per distinct text where the complementary encoder has no trained prompts."""
    y_cache_mb: Count = 2048
    """Memory for these features in MiB; y of an encoder whose features do not fit is computed in every step."""
    metric: Literal["auto", "accuracy", "f1_macro", "f1_micro"] = "auto"
    """Validation metric of the best checkpoint; auto: accuracy, or f1_micro for multi-label."""
    early_stopping: Positive | None = None
    """Stop after so many epochs without a better validation metric."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = None
    """CPU threads of one process; null for all cores, divided among the processes of this machine."""
    log_every: Positive = 50
    """Optimiser steps between two log lines."""
    save_every: Positive | None = None
    """Optimiser steps between two resume states, besides the one after every epoch."""
    tensorboard: bool = True


class RunSection(Strict):
    """The run folder."""

    dir: str | None = None
    """The folder; null for ``<root>/<recipe name>-<time>``."""
    root: str = "runs"
    standalone: bool = False
    """Also store the frozen encoders in ``best/`` at the end, so that it loads on machines without network."""


class Recipe(Strict):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "recipe"
    """Names the run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random in training: initial weights, order of samples, dropout, routing noise."""
    data: DataSection
    model: MoPEConfig
    """Every value of the model, as in ``mope_deploy.model.MoPEConfig``; labels may be left out: then they are the names
    found in the training rows, sorted."""
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    baselines: bool = False
    """Also train heads on the same frozen features: image only, text only, late concatenation (linear and MLP)."""
    resume: bool = False
    """Continue the run in ``run.dir``."""

    @model_validator(mode="after")
    def _readable(self) -> Recipe:
        read = {section.modality for section in self.model.encoders}
        other = sorted(read - {"image", "text"})
        if other and (self.data.name or self.data.hub):
            source = f"data.name={self.data.name}" if self.data.name else f"data.hub={self.data.hub}"
            raise ValueError(f"{source} brings images and texts, not {', '.join(other)}; give JSONL files: data.train")
        return self

    def to_dict(self) -> dict[str, Any]:
        """These values as YAML-ready types."""
        return self.model_dump(mode="json")
