"""What a MoPE model is made of, as plain values. Defaults are the papers' (arXiv 2312.03734, 2403.10568).

The one configuration: a recipe's ``model:`` section and a checkpoint's are it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from mope_deploy.errors import ConfigError
from mope_deploy.fields import hidden, shown
from mope_deploy.limits import MAX_LABEL_CHARS, MAX_LABELS
from mope_deploy.model.strict import Listed, Strict, problems, refused
from mope_deploy.task import TASKS, MultiLabel, SingleLabel

__all__ = ["EncoderSpec", "MoPEConfig", "Modality"]

SOURCE_SCHEMES = ("timm", "hf", "dir", "embedded")


def _one_of(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            *most, last = map(repr, names)
            raise ValueError(f"received {shown(value)}, expected {', '.join(most)} or {last}")
        return value

    return AfterValidator(check)


Positive = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=0, le=2**16)]
PositiveReal = Annotated[float, Field(gt=0)]
Modality = Annotated[str, _one_of("image", "text", "audio", "video")]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("received duplicates, expected every name once")
    return names


def _few(labels: Any) -> Any:
    if isinstance(labels, list | tuple) and len(labels) > MAX_LABELS:
        raise ValueError(f"received {len(labels):,}, expected at most {MAX_LABELS:,}")
    return () if labels is None else labels


def _named(label: str) -> str:
    """What no bundle has for a name: said before anything is trained."""
    if not label.strip() or len(label) > MAX_LABEL_CHARS:
        raise ValueError(f"received {shown(label)}, expected 1 to {MAX_LABEL_CHARS} characters that are not all blank")
    if found := hidden(label):
        raise ValueError(f"received {shown(label)} with {found}, expected characters that can be shown")
    return label


Label = Annotated[str, AfterValidator(_named)]
Labels = Annotated[Listed[Label], AfterValidator(_distinct), BeforeValidator(_few)]


class EncoderSpec(Strict):
    """One frozen encoder."""

    modality: Modality
    source: str
    """Where its architecture and weights come from: ``timm:NAME[.TAG]``, ``hf:ID``, ``dir:PATH`` (a folder in timm's or
    transformers' own format) or ``embedded:NAME``."""
    prompts: Count = 0
    """Static prompts per layer that condition a *complementary* encoder itself (paper: 4 for text); 0 for none. A main
    encoder's prompts are set by :class:`MoPEConfig`, so it must be 0 there."""
    max_length: Annotated[int, Field(ge=3, le=2**20)] | None = None
    """Longest text in tokens, two special tokens included; None takes the encoder's own limit, at most 128."""
    max_seconds: PositiveReal | None = None
    """Longest sound or video; what comes later is cut off. Encoders that need clips of one length pad each to it. None
    takes 10 s of sound and 60 s of video; a Whisper encoder has a length of its own."""

    @field_validator("source")
    @classmethod
    def _has_a_scheme(cls, value: str) -> str:
        scheme, _, rest = value.partition(":")
        if scheme not in SOURCE_SCHEMES or not rest:
            raise ValueError(f"received {shown(value)}, expected {', '.join(s + ':…' for s in SOURCE_SCHEMES)}")
        return value

    @field_validator("max_length", "max_seconds")
    @classmethod
    def _is_for_its_modality(cls, value: float | None, info: ValidationInfo) -> float | None:
        modality = info.data.get("modality")
        readers = ("text",) if info.field_name == "max_length" else ("audio", "video")
        if value is not None and modality is not None and modality not in readers:
            raise ValueError(f"received {value}, expected none for {modality}")
        return value


class MoPEConfig(Strict):
    """Everything that defines a MoPE model apart from its weights."""

    main: EncoderSpec
    """The encoder X that every prompt conditions."""
    complementary: Listed[EncoderSpec]
    """The encoders Y whose pooled features condition X, at least one."""
    labels: Labels = ()
    """Class names in the order of the logits. A recipe may leave them to its training rows; a model needs them."""
    missing: Annotated[Listed[Modality], AfterValidator(_distinct)] = ()
    """Complementary modalities that a sample may lack; each has a learned stand-in for its y."""
    task: Annotated[str, _one_of(*TASKS)] = SingleLabel.type
    """``single-label``, exactly one label a sample (softmax), or ``multi-label``, any number (a sigmoid for each)."""
    prompt_length: Positive = 6
    """L, tokens of the static and of the dynamic prompt of each layer."""
    experts: Positive = 4
    """K, prompt experts per layer."""
    static: bool = True
    """Whether layers have a static prompt."""
    dynamic: bool = True
    """Whether layers have a dynamic prompt, mixed from their experts by their router."""
    mapped: bool = True
    """Whether layers have one mapped prompt token per complementary modality."""
    top_k: Count = 0
    """0 for dense routing (all experts, soft weights), else how many experts are kept and renormalised."""
    temperature: PositiveReal = 0.1
    """τ of the router's softmax."""
    d_x: Count = 2
    """Router width of the main modality; 0 routes on y alone."""
    d_y: Positive = 8
    """Router width of each complementary modality."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """σ of the Gaussian noise on the routing scores, in training only; None for the paper's 1/K."""
    similarity: Literal["dot", "cosine"] = "dot"
    """Between the query q and the routing embeddings; the paper's is ``dot``."""
    train_embeddings: bool = False
    """Whether the routing embeddings U train; the paper freezes them."""
    routing_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the orthogonal routing embeddings, which are a pure function of it."""
    mapper_width: Positive | None = None
    """Bottleneck of the mapper; None for the paper's D_y/2."""
    mapper_per_layer: bool = False
    """Whether every layer has a mapper of its own; the paper shares one."""
    y_norm: Literal["none", "standardise"] = "none"
    """``standardise``: y minus its training mean, over its training deviation; the paper's is ``none``."""
    prompt_init: Literal["normal", "uniform"] = "normal"
    """Distribution of the initial values of static prompts and experts."""
    prompt_init_scale: PositiveReal = 0.02
    """Standard deviation (normal) or half width (uniform) of those values."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on all three kinds of prompt, in training only."""

    @field_validator("main")
    @classmethod
    def _has_no_prompts(cls, value: EncoderSpec) -> EncoderSpec:
        if value.prompts:
            raise ValueError(f"received prompts {value.prompts}, expected 0 (prompt_length sets the main encoder's)")
        return value

    @field_validator("complementary")
    @classmethod
    def _are_others(cls, value: tuple[EncoderSpec, ...], info: ValidationInfo) -> tuple[EncoderSpec, ...]:
        if not value:
            raise ValueError("received no encoder, expected at least one")
        specs = (*([info.data["main"]] if "main" in info.data else []), *value)
        modalities = [spec.modality for spec in specs]
        if len(set(modalities)) != len(modalities):
            raise ValueError(f"received modalities {', '.join(modalities)}, expected each of them once")
        return value

    @field_validator("missing")
    @classmethod
    def _are_complementary(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        optional = [spec.modality for spec in info.data.get("complementary", ())]
        if optional and not set(value) <= set(optional):
            main = "main" in info.data and info.data["main"].modality in value
            why = " (the main modality never may)" if main else ""
            raise ValueError(f"received {', '.join(value)}, expected some of {', '.join(optional)}{why}")
        return value

    @field_validator("top_k")
    @classmethod
    def _are_there(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("experts", value):
            raise ValueError(f"received {value}, expected at most experts = {info.data['experts']}")
        return value

    @property
    def sigma(self) -> float:
        """Standard deviation of the routing noise in training."""
        return 1.0 / self.experts if self.noise is None else self.noise

    @property
    def encoders(self) -> tuple[EncoderSpec, ...]:
        """The main encoder and the complementary ones."""
        return (self.main, *self.complementary)

    def make_task(self) -> SingleLabel | MultiLabel:
        """What logits and labels of this model mean."""
        return TASKS[self.task](labels=self.labels)

    def check_labels(self) -> None:
        """Raise :class:`ConfigError` where a model of this task needs more labels than there are."""
        fewest = TASKS[self.task].fewest_labels
        if len(self.labels) < fewest:
            raise ConfigError(
                f"labels of a {self.task} model", received=len(self.labels), expected=f"at least {fewest}"
            )

    def to_dict(self) -> dict[str, Any]:
        """These values as JSON-ready types."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoPEConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: naming everything that is missing, unknown, of another type or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise refused("the model configuration", problems(error, cls)) from None
