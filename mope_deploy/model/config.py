"""What a MoPE model is made of, as plain values. Defaults are the papers' (arXiv 2312.03734, 2403.10568)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mope_deploy.errors import ConfigError

__all__ = ["EncoderSpec", "MoPEConfig"]

MODALITIES = ("image", "text", "audio", "video")
SOURCE_SCHEMES = ("timm", "hf", "dir", "embedded")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """One frozen encoder.

    Attributes:
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        source: where its architecture and weights come from: ``timm:NAME[.TAG]``, ``hf:ID``, ``dir:PATH`` (a folder in
            timm's or transformers' own format) or ``embedded:NAME``.
        prompts: static prompts per layer that condition a *complementary* encoder itself (paper: 4 for text); 0 for
            none. A main encoder's prompts are set by :class:`MoPEConfig`, so it must be 0 there.
        max_length: longest text in tokens, special tokens included; ``None`` takes the encoder's own limit, at most
            128.
        max_seconds: longest sound or video; what comes later is cut off. Encoders that need clips of one length pad
            each to it. ``None`` takes 10 s of sound and 60 s of video; a Whisper encoder has a length of its own.
    """

    modality: str
    source: str
    prompts: int = 0
    max_length: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class MoPEConfig:
    """Everything that defines a MoPE model apart from its weights.

    Attributes:
        main: the encoder X that every prompt conditions.
        complementary: the encoders Y whose pooled features condition X, at least one.
        labels: class names; their order is the order of the logits.
        missing: complementary modalities that a sample may lack; each has a learned stand-in for its y.
        multi_label: whether a sample may carry several labels (sigmoid per label) instead of exactly one (softmax).
        prompt_length: L, tokens of the static and of the dynamic prompt of each layer.
        experts: K, prompt experts per layer.
        static: whether layers have a static prompt.
        dynamic: whether layers have a dynamic prompt, mixed from their experts by their router.
        mapped: whether layers have one mapped prompt token per complementary modality.
        top_k: 0 for dense routing (all experts, soft weights), else how many experts are kept and renormalised.
        temperature: τ of the router's softmax.
        d_x: router width of the main modality; 0 routes on y alone.
        d_y: router width of each complementary modality.
        noise: σ of the Gaussian noise on the routing scores, in training only; ``None`` for the paper's 1/K.
        similarity: ``"dot"`` (paper) or ``"cosine"`` between the query q and the routing embeddings.
        train_embeddings: whether the routing embeddings U train; the paper freezes them.
        routing_seed: seed of the orthogonal routing embeddings, which are a pure function of it.
        mapper_width: bottleneck of the mapper; ``None`` for the paper's D_y/2.
        mapper_per_layer: whether every layer has a mapper of its own; the paper shares one.
        y_norm: ``"none"`` (paper) or ``"standardise"``: y minus its training mean, over its training deviation.
        prompt_init: ``"normal"`` or ``"uniform"`` initial values of static prompts and experts.
        prompt_init_scale: standard deviation (normal) or half width (uniform) of those values.
        prompt_dropout: dropout on all three kinds of prompt, in training only.
    """

    main: EncoderSpec
    complementary: tuple[EncoderSpec, ...]
    labels: tuple[str, ...]
    missing: tuple[str, ...] = ()
    multi_label: bool = False
    prompt_length: int = 6
    experts: int = 4
    static: bool = True
    dynamic: bool = True
    mapped: bool = True
    top_k: int = 0
    temperature: float = 0.1
    d_x: int = 2
    d_y: int = 8
    noise: float | None = None
    similarity: str = "dot"
    train_embeddings: bool = False
    routing_seed: int = 0
    mapper_width: int | None = None
    mapper_per_layer: bool = False
    y_norm: str = "none"
    prompt_init: str = "normal"
    prompt_init_scale: float = 0.02
    prompt_dropout: float = 0.1

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError("the model configuration cannot be used: " + "; ".join(problems))

    @property
    def sigma(self) -> float:
        """Standard deviation of the routing noise in training."""
        return 1.0 / self.experts if self.noise is None else self.noise

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, each as a phrase; empty if they can be used."""
        found: list[str] = []
        specs = [("main", self.main)] + [(f"complementary[{i}]", spec) for i, spec in enumerate(self.complementary)]
        for name, spec in specs:
            found += [f"{name}.{problem}" for problem in _encoder_problems(spec)]
        if self.main.prompts:
            found.append(
                f"main.prompts: received {self.main.prompts}, expected 0 (prompt_length sets the main encoder's)"
            )
        if not self.complementary:
            found.append("complementary: received no encoder, expected at least one")
        modalities = [spec.modality for _, spec in specs]
        if len(set(modalities)) != len(modalities):
            found.append(f"modalities: received {modalities}, expected each of them once")
        optional = [spec.modality for spec in self.complementary]
        if not set(self.missing) <= set(optional) or len(set(self.missing)) != len(self.missing):
            why = " (the main modality never may)" if self.main.modality in self.missing else ""
            found.append(f"missing: received {list(self.missing)}, expected some of {optional}{why}")
        if len(self.labels) < 2 and not (self.multi_label and self.labels):
            found.append(f"labels: received {len(self.labels)}, expected at least 2")
        if len(set(self.labels)) != len(self.labels):
            found.append("labels: received duplicates, expected every name once")
        for field, low in (("prompt_length", 1), ("experts", 1), ("top_k", 0), ("d_x", 0), ("d_y", 1)):
            value = getattr(self, field)
            if value < low:
                found.append(f"{field}: received {value}, expected at least {low}")
        if self.top_k > self.experts:
            found.append(f"top_k: received {self.top_k}, expected at most experts = {self.experts}")
        if self.mapper_width is not None and self.mapper_width < 1:
            found.append(f"mapper_width: received {self.mapper_width}, expected at least 1")
        for field, low_open, high in (
            ("temperature", 0.0, math.inf),
            ("prompt_init_scale", 0.0, math.inf),
        ):
            value = getattr(self, field)
            if not (low_open < value < high):
                found.append(f"{field}: received {value}, expected a positive number")
        if self.noise is not None and not (0.0 <= self.noise < math.inf):
            found.append(f"noise: received {self.noise}, expected at least 0")
        if not 0.0 <= self.prompt_dropout < 1.0:
            found.append(f"prompt_dropout: received {self.prompt_dropout}, expected at least 0 and below 1")
        for field, allowed in (
            ("similarity", ("dot", "cosine")),
            ("y_norm", ("none", "standardise")),
            ("prompt_init", ("normal", "uniform")),
        ):
            value = getattr(self, field)
            if value not in allowed:
                found.append(f"{field}: received {value!r}, expected one of {', '.join(allowed)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """These values as JSON-ready types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoPEConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: for unknown or missing keys, naming the nearest known one, and for values out of range.
        """
        kwargs = _known_keys(cls, values, "model configuration")
        kwargs["main"] = _encoder(kwargs["main"], "main")
        kwargs["complementary"] = tuple(
            _encoder(spec, f"complementary[{i}]") for i, spec in enumerate(kwargs["complementary"])
        )
        kwargs["labels"] = tuple(kwargs["labels"])
        kwargs["missing"] = tuple(kwargs.get("missing", ()))
        return cls(**kwargs)


def _encoder(values: Any, where: str) -> EncoderSpec:
    if isinstance(values, EncoderSpec):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is not an encoder", received=repr(values), expected="modality and source")
    return EncoderSpec(**_known_keys(EncoderSpec, values, where))


def _known_keys(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` as keyword arguments of the dataclass ``cls``, checked by name."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = []
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            problems.append(f"missing key {name!r}")
    if problems:
        raise ConfigError(f"{where}: " + ", ".join(problems))
    return dict(values)


def _encoder_problems(spec: EncoderSpec) -> list[str]:
    found = []
    if spec.modality not in MODALITIES:
        found.append(f"modality: received {spec.modality!r}, expected one of {', '.join(MODALITIES)}")
    scheme, _, rest = spec.source.partition(":")
    if scheme not in SOURCE_SCHEMES or not rest:
        found.append(f"source: received {spec.source!r}, expected {', '.join(s + ':…' for s in SOURCE_SCHEMES)}")
    if spec.prompts < 0:
        found.append(f"prompts: received {spec.prompts}, expected at least 0")
    if spec.max_length is not None and spec.max_length < 3:
        found.append(f"max_length: received {spec.max_length}, expected at least 3 (two are special tokens)")
    if spec.max_length is not None and spec.modality != "text":
        found.append(f"max_length: received {spec.max_length}, expected none for {spec.modality}")
    if spec.max_seconds is not None:
        if spec.modality not in ("audio", "video"):
            found.append(f"max_seconds: received {spec.max_seconds}, expected none for {spec.modality}")
        elif not 0.0 < spec.max_seconds < math.inf:
            found.append(f"max_seconds: received {spec.max_seconds}, expected a positive number")
    return found
