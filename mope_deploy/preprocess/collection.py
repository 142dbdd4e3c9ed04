"""All of a model's modalities together: raw samples → the model's named arrays.

The same code in training, in the export gate and on the device.

Letters: B batch · H, W height and width at the encoder · T text length in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from msgspec import json
from numpy.typing import NDArray

from mope_deploy.arguments import check_integer
from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.fields import MAY_LACK, check_distinct, choice, decode, length, shown, twice
from mope_deploy.preprocess.audio import AudioSource, AudioSpec
from mope_deploy.preprocess.image import ImageSource, ImageSpec, normalise
from mope_deploy.preprocess.shared import Notice, Tensors
from mope_deploy.preprocess.text import TextReader, TextSpec, check_text
from mope_deploy.preprocess.video import VideoSource, VideoSpec

__all__ = ["MODALITIES", "Preprocessing", "Specs", "present_name", "tensors_of"]

MODALITIES = ("image", "text", "audio", "video")


_LOADED = {"image": "uint8", "audio": "float32", "video": "uint8"}  # what load returns


def present_name(modality: str) -> str:
    """The input that says which samples of a batch have ``modality``: int64 (B,), 1 = it is there."""
    return f"{modality}_present"


def tensors_of(specs: Mapping[str, Any], missing: Sequence[str] = ()) -> Tensors:
    """The arrays that are made of these modalities, by name; see :attr:`Preprocessing.tensors`."""
    made: Tensors = {}
    for name, spec in specs.items():
        made |= spec.tensors
        if name in missing:
            made[present_name(name)] = ("int64", ("batch",))
    return made


@dataclass(frozen=True, kw_only=True)
class Specs:
    """How each modality is prepared, as checkpoints and manifests have it; see :class:`Preprocessing`."""

    image: ImageSpec | None
    text: TextSpec | None
    # Only where there are any: releases before sound and video read everything else.
    audio: AudioSpec | None = field(default=None, metadata=MAY_LACK)
    video: VideoSpec | None = field(default=None, metadata=MAY_LACK)
    missing: Annotated[tuple[Annotated[str, choice(*MODALITIES)], ...], length(1, len(MODALITIES))] | None = field(
        default=None, metadata=MAY_LACK
    )

    def __post_init__(self) -> None:
        check_distinct("missing", self.missing or ())


@dataclass(frozen=True)
class Preprocessing:
    """Everything between raw inputs and the model's named arrays.

    Args:
        image, text, audio, video: how each is prepared; None where the model does not read it.
        tokenizer: the JSON text of ``tokenizer.json``, there if and only if ``text`` is.
        missing: modalities that a sample may lack; the model has a learned stand-in for each.
    """

    image: ImageSpec | None
    text: TextSpec | None
    tokenizer: str | None = None
    audio: AudioSpec | None = None
    video: VideoSpec | None = None
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) != (self.tokenizer is None):
            raise ConfigError("preprocessing of text needs both a text specification and a tokenizer")
        unknown = [name for name in self.missing if name not in self.modalities]
        if unknown or twice(self.missing) is not None:
            received, expected = ", ".join(self.missing), f"some of {', '.join(self.modalities)}, once each"
            raise ConfigError("modalities that may be missing", received=received, expected=expected)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)

    @property
    def tensors(self) -> Tensors:
        """Every array that :meth:`collate` makes: name → dtype and axes, sizes or names of axes that vary."""
        return tensors_of({name: getattr(self, name) for name in self.modalities}, self.missing)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the tokenizer is not in it, it travels as a file of its own."""
        found = {one.name: getattr(self, one.name) or None for one in fields(Specs)}
        optional = {one.name for one in fields(Specs) if one.metadata == MAY_LACK}
        given = {name: spec for name, spec in found.items() if spec is not None or name not in optional}
        return json.decode(json.encode(given))

    @classmethod
    def from_dict(cls, value: object, *, tokenizer: str | None = None, where: str = "preprocess") -> Preprocessing:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: naming ``where`` and the key: unknown, missing, of another type or out of range.
        """
        read = decode(value, Specs, where, ConfigError)
        return cls(read.image, read.text, tokenizer, read.audio, read.video, read.missing or ())

    def load(self, modality: str, source: Any, *, on_notice: Notice = lambda _: None) -> Any:
        """One input of ``modality`` as :meth:`collate` takes it.

        Args:
            modality: one of :attr:`modalities`.
            source: a text; or what ``load`` of :class:`ImageSpec`, :class:`AudioSpec` or :class:`VideoSpec` takes.
            on_notice: told, in a few words, what should be known about an input that can be used all the same.

        Returns:
            The text, or the array that ``load`` returns.

        Raises:
            MediaError, MissingExtraError: as ``load`` and :meth:`check_text`.
        """
        spec = self._spec(modality)
        return self.check_text(source) if modality == "text" else spec.load(source, on_notice=on_notice)

    def load_image(self, source: ImageSource) -> NDArray[np.uint8]:
        """See :meth:`ImageSpec.load`."""
        return self.load("image", source)

    def load_audio(self, source: AudioSource, *, on_notice: Notice = lambda _: None) -> NDArray[np.float32]:
        """See :meth:`AudioSpec.load`."""
        return self.load("audio", source, on_notice=on_notice)

    def load_video(self, source: VideoSource, *, on_notice: Notice = lambda _: None) -> NDArray[np.uint8]:
        """See :meth:`VideoSpec.load`."""
        return self.load("video", source, on_notice=on_notice)

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, H, W, 3) as :meth:`load_image` returns them → float32 (B, 3, H, W), ``(x / 255 - mean) / std``."""
        return normalise(images, self._spec("image"))

    def encode_text(
        self,
        texts: Sequence[str | None],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[np.int64]]:
        """Tokenise, truncate to ``max_length`` with the special tokens kept, pad on the right.

        Args:
            texts: B strings; None where a text is missing, if it may be.
            pad_to: text length T of the arrays; without it the longest of the batch.
            on_truncate: called with (index in ``texts``, tokens before the cut) for each text that was cut.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (B, T), 1 = real token.

        Raises:
            MediaError: a text that is no string, is empty, holds NUL or lone surrogates, is longer than the stated
                limit, or has no token but special ones.
        """
        _check_list("texts", texts, of="strings")
        pad_to = None if pad_to is None else check_integer("pad_to", pad_to, 1)
        if "text" not in self.missing:
            texts = [check_text(text) for text in texts]
        return self._texts.encode(texts, pad_to=pad_to, on_truncate=on_truncate)

    def check_text(self, text: object) -> str:
        """Return ``text`` if :meth:`encode_text` would take it; else raises as that does."""
        return self._texts.check(text)

    def check_tokenizer(self) -> None:
        """Parse the tokenizer now rather than at the first text.

        Raises:
            ConfigError: it cannot be parsed, or has more special tokens than ``max_length``.
        """
        if self.text is not None:
            _ = self._texts

    def collate(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """B samples → the model's named arrays.

        Args:
            samples: each has what the model reads, by modality. An array is taken as what :meth:`load` returned
                (cached, say); a path or a Pillow image is loaded first. None, or nothing, where a modality is missing.
            pad_to, on_truncate: see :meth:`encode_text`.

        Raises:
            UsageError: a sample lacks a modality that may not be missing.
        """
        _check_list("samples", samples, of="a dict each")
        if wrong := [sample for sample in samples if not isinstance(sample, Mapping)]:
            raise UsageError("samples", received=f"{shown(wrong[0])} among them", expected="a list of a dict each")
        arrays: dict[str, NDArray[Any]] = {}
        for name in self.modalities:
            items = [sample.get(name) for sample in samples]
            if name != "text":
                items = [one if one is None or isinstance(one, np.ndarray) else self.load(name, one) for one in items]
            arrays |= self.arrays(name, items, pad_to=pad_to, on_truncate=on_truncate)
        return arrays

    def arrays(
        self,
        modality: str,
        items: Sequence[Any],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The arrays of one modality.

        Args:
            modality: one of :attr:`modalities`.
            items: B results of :meth:`load`; None where it is missing.
            pad_to, on_truncate: see :meth:`encode_text`.

        Returns:
            Its arrays by name; with ``<modality>_present`` int64 (B,) where the modality may be missing.

        Raises:
            UsageError: one is missing, and may not be; or is no such result.
        """
        _check_list(f"items of {modality}", items, of="what load returned")
        present = np.array([item is not None for item in items], np.int64)
        if modality not in self.missing and not present.all():
            expected = "one in every sample: this model has no stand-in for it"
            raise UsageError(f"{modality} is missing", expected=expected)
        if modality == "text":
            made: dict[str, Any] = dict(self.encode_text(items, pad_to=pad_to, on_truncate=on_truncate))
        else:
            made = self._batch(modality, items)
        return made | ({present_name(modality): present} if modality in self.missing else {})

    def _batch(self, modality: str, items: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """An array that another hand made, of floats from 0 to 1 say, would be prepared as if it were loaded."""
        spec, dtype = self._spec(modality), np.dtype(_LOADED[modality])
        for item in items:
            if item is None:
                continue
            if not isinstance(item, np.ndarray) or item.dtype != dtype:
                received = str(item.dtype) if isinstance(item, np.ndarray) else shown(item)
                raise UsageError(f"array of {modality}", received=received, expected=f"{dtype}, as load returns it")
            if dtype.kind == "f" and not np.isfinite(item).all():
                raise UsageError(f"array of {modality}", received="NaN or infinity", expected="finite values")
        try:
            made = spec.batch(items)
        except (ValueError, TypeError):  # numpy's, on shapes that do not go together
            made = {}
        for name, (_, axes) in spec.tensors.items():
            shape = made[name].shape if name in made else ()
            fits = len(shape) == len(axes) and all(
                n == m for n, m in zip(shape, axes, strict=True) if isinstance(m, int)
            )
            if not fits:
                received = ", ".join(dict.fromkeys(str(item.shape) for item in items if item is not None))
                raise UsageError(f"arrays of {modality}", received=f"shapes {received}", expected="those of load")
        return made

    @cached_property
    def _texts(self) -> TextReader:
        spec = self._spec("text")
        assert self.tokenizer is not None
        return TextReader(spec, self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process of a data loader makes its own tokenizer.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def _spec(self, modality: str) -> Any:
        if modality not in MODALITIES:
            raise UsageError("modality", received=shown(modality), expected=f"one of {', '.join(MODALITIES)}")
        spec = getattr(self, modality)
        if spec is None:
            names = {"image": "images", "video": "videos"}
            raise UsageError(f"this model reads no {names.get(modality, modality)}")
        return spec


def _check_list(name: str, value: object, *, of: str) -> None:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise UsageError(name, received=shown(value), expected=f"a list of {of}, at least one")
