"""Raw image and text → named arrays; the same code in training, in the export gate and on the device.

Images follow timm's evaluation transform to the last bit (``timm.data.create_transform(..., is_training=False)``:
resize by Pillow, center crop, ``/255``, ``(x - mean) / std``, all in float32), without importing timm or torch. What
comes before it, from a file to 8-bit RGB, is stated here and in docs/bundle.md:

- the first frame of an animation; EXIF orientation applied; palettes expanded; CMYK and YCbCr converted by Pillow;
- anything with transparency is composited on white;
- 16-bit greyscale is scaled to 8 bits (rounded); 32-bit integer and float images are refused, their range is unknown;
- at most 16,384 pixels a side and 100 megapixels in all, checked in the header before anything is decoded.

Letters: B batch · H, W height and width at the encoder · T text length in tokens.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mope_deploy.errors import ConfigError, MediaError, UsageError
from mope_deploy.fields import Fields, shown

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["MAX_PIXELS", "MAX_SIDE", "MAX_TEXT_CHARS", "ImageSource", "ImageSpec", "Preprocessing", "TextSpec"]

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 100_000_000
MAX_TEXT_CHARS = 1_000_000
BACKGROUND = (255, 255, 255)  # what transparent pixels are composited on

# EPS would run Ghostscript, and rarely used decoders are where decoders have their holes: only these are ever tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
CROP_MODES = ("center", "squash", "border")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")
ImageSource = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class ImageSpec:
    """How an 8-bit RGB image becomes what the image encoder reads.

    Args:
        height, width: pixels at the encoder.
        resize_height, resize_width: pixels the image is resized to before the crop. ``center`` keeps its shape and
            covers them, ``border`` keeps its shape and fits inside them, ``squash`` meets both exactly.
        crop_mode: timm's name: ``center``, ``squash`` or ``border`` (pads with the mean colour).
        interpolation: a Pillow filter by timm's name.
        mean, std: of each channel, on the scale 0 to 1.
    """

    height: int
    width: int
    resize_height: int
    resize_width: int
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> ImageSpec:
        """From the dict of ``timm.data.resolve_data_config`` (or ``resolve_model_data_config``).

        Raises:
            ConfigError: if the encoder does not read three channels, or a value is outside what is supported.
        """
        channels, height, width = config["input_size"]
        if channels != 3:
            raise ConfigError("the image encoder's input", received=f"{channels} channels", expected="3 (RGB)")
        crop = config["crop_pct"]
        spec = cls(
            height=height,
            width=width,
            resize_height=math.floor(height / crop),
            resize_width=math.floor(width / crop),
            crop_mode=config.get("crop_mode") or "center",
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
        return cls.from_dict(asdict(spec), where="the image encoder's transform")

    @classmethod
    def from_dict(cls, value: object, *, where: str = "image") -> ImageSpec:
        """Strict: every key, no other, types and ranges checked.

        Raises:
            ConfigError: naming ``where`` and the key.
        """
        read = Fields(value, where, ConfigError, required=[field.name for field in fields(cls)])
        return cls(
            height=read.integer("height", 1, 4096),
            width=read.integer("width", 1, 4096),
            resize_height=read.integer("resize_height", 1, 8192),
            resize_width=read.integer("resize_width", 1, 8192),
            crop_mode=read.choice("crop_mode", CROP_MODES),
            interpolation=read.choice("interpolation", tuple(_FILTERS)),
            mean=read.numbers("mean", 3, 0.0, 1.0),  # type: ignore[arg-type]
            std=read.numbers("std", 3, 1e-6, 1e3),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes what the text encoder reads.

    Args:
        max_length: tokens, special ones included; longer texts are truncated on the right.
        pad_id: token id of padding.
    """

    max_length: int
    pad_id: int

    @classmethod
    def from_dict(cls, value: object, *, where: str = "text") -> TextSpec:
        """Strict; see :meth:`ImageSpec.from_dict`."""
        read = Fields(value, where, ConfigError, required=[field.name for field in fields(cls)])
        return cls(max_length=read.integer("max_length", 1, 65_536), pad_id=read.integer("pad_id", 0, 2**31 - 1))


@dataclass(frozen=True)
class Preprocessing:
    """Everything between raw inputs and the model's named arrays.

    Args:
        image: how images are prepared, if the model reads any.
        text: how texts are prepared, if the model reads any.
        tokenizer: the JSON text of ``tokenizer.json``, there if and only if ``text`` is.
    """

    image: ImageSpec | None
    text: TextSpec | None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.tokenizer is None):
            raise ConfigError("preprocessing of text needs both a text specification and a tokenizer")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the tokenizer is not in it, it travels as a file of its own."""
        return {
            "image": None if self.image is None else _jsonable(asdict(self.image)),
            "text": None if self.text is None else asdict(self.text),
        }

    @classmethod
    def from_dict(cls, value: object, *, tokenizer: str | None = None, where: str = "preprocess") -> Preprocessing:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: naming ``where`` and the key: unknown, missing, of another type or out of range.
        """
        read = Fields(value, where, ConfigError, required=("image", "text"))
        image = read.maybe("image", lambda item, place: ImageSpec.from_dict(item, where=place))
        text = read.maybe("text", lambda item, place: TextSpec.from_dict(item, where=place))
        return cls(image=image, text=text, tokenizer=tokenizer)

    def load_image(self, source: ImageSource) -> NDArray[np.uint8]:
        """Decode, turn upright, convert to RGB, resize and crop. Deterministic, so that training may cache it.

        Args:
            source: a path, a Pillow image, or a uint8 array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

        Returns:
            uint8 (height, width, 3) of the encoder, contiguous.

        Raises:
            MediaError: one line naming the file: missing, empty, not an image, truncated, outside the stated limits.
        """
        spec = self._image_spec()
        name = describe(source)
        with warnings.catch_warnings():
            # Pillow warns about sizes that the stated limits here decide, and about metadata that is not used.
            warnings.simplefilter("ignore")
            image = _open(source, name)
            try:
                return _fit(_to_rgb(image, name), spec, name)
            finally:
                if image is not source:
                    image.close()

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, H, W, 3) as :meth:`load_image` returns them → float32 (B, 3, H, W), ``(x / 255 - mean) / std``."""
        spec = self._image_spec()
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (spec.height, spec.width, 3):
            raise UsageError(
                "images to normalise",
                received=f"{images.dtype} {images.shape}",
                expected=f"uint8 (B, {spec.height}, {spec.width}, 3) from load_image",
            )
        # One float32 rounding per step and in this order: what torchvision's ToTensor and Normalize do.
        x = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)  # (B, 3, H, W)
        x /= np.float32(255)
        x -= np.asarray(spec.mean, np.float32)[:, None, None]
        x /= np.asarray(spec.std, np.float32)[:, None, None]
        return x

    def encode_text(
        self,
        texts: Sequence[str],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[np.int64]]:
        """Tokenise, truncate to ``max_length`` with the special tokens kept, pad on the right.

        Args:
            texts: B strings.
            pad_to: text length T of the arrays; without it the longest of the batch.
            on_truncate: called with (index in ``texts``, tokens before the cut) for each text that was cut.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (B, T), 1 = real token.

        Raises:
            MediaError: a text that is no string, is empty, holds NUL or lone surrogates, is longer than the stated
                limit, or has no token but special ones.
        """
        spec = self._text_spec()
        if isinstance(texts, str):
            raise UsageError("texts", received="one string", expected="a list of strings")
        if not texts:
            raise UsageError("texts", received="an empty list", expected="at least one text")
        rows: list[list[int]] = []
        for index, text in enumerate(texts):
            # One by one: the library's threads, once used, warn about every later fork (a data loader's workers).
            encoding = self._encode(check_text(text))
            if encoding.overflowing and on_truncate is not None:
                rest = sum(len(more.ids) - self._special for more in encoding.overflowing)
                on_truncate(index, len(encoding.ids) + rest)
            rows.append(encoding.ids)
        longest = max(map(len, rows))
        if pad_to is not None and not longest <= pad_to <= spec.max_length:
            raise UsageError(
                "pad_to", received=pad_to, expected=f"{longest} (the longest text here) to {spec.max_length}"
            )
        length = pad_to or longest
        ids = np.full((len(rows), length), spec.pad_id, np.int64)  # (B, T)
        mask = np.zeros((len(rows), length), np.int64)  # (B, T)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def collate(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """B samples → the model's named arrays.

        Args:
            samples: each has ``image`` and ``text`` as far as the model reads them. An image that is an array is
                taken as what :meth:`load_image` returned (cached, say); a path or a Pillow image is loaded first.
            pad_to, on_truncate: see :meth:`encode_text`.
        """
        if not samples:
            raise UsageError("samples", received="an empty list", expected="at least one sample")
        arrays: dict[str, NDArray[Any]] = {}
        if self.image is not None:
            images = [sample["image"] for sample in samples]
            loaded = [image if isinstance(image, np.ndarray) else self.load_image(image) for image in images]
            arrays["pixel_values"] = self.normalise(np.stack(loaded))
        if self.text is not None:
            texts = [sample["text"] for sample in samples]
            arrays.update(self.encode_text(texts, pad_to=pad_to, on_truncate=on_truncate))
        return arrays

    def check_text(self, text: object) -> str:
        """Return ``text`` if :meth:`encode_text` would take it.

        Raises:
            MediaError: as :meth:`encode_text`.
        """
        checked = check_text(text)
        self._encode(checked)
        return checked

    def _encode(self, text: str) -> Encoding:
        try:
            encoding = _rust(self._tokenizer.encode, text)
        except _TokenizerError as error:  # an unknown word and no token for such, say
            raise MediaError(
                "text cannot be tokenised", received=f"{shown(text)}: {error}", todo="is tokenizer.json complete?"
            ) from error
        if len(encoding.ids) <= self._special:
            raise MediaError("text has no tokens", received=shown(text), expected="at least one word")
        return encoding

    @cached_property
    def _special(self) -> int:
        return self._tokenizer.num_special_tokens_to_add(False)

    def check_tokenizer(self) -> None:
        """Parse the tokenizer now rather than at the first text.

        Raises:
            ConfigError: it cannot be parsed, or has more special tokens than ``max_length``.
        """
        if self.text is not None:
            _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        spec = self._text_spec()
        assert self.tokenizer is not None
        try:
            tokenizer = _rust(Tokenizer.from_str, self.tokenizer)
        except _TokenizerError as error:
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
        special = tokenizer.num_special_tokens_to_add(False)
        if spec.max_length <= special:
            raise ConfigError(
                "text.max_length",
                received=spec.max_length,
                expected=f"more than the tokenizer's {special} special tokens",
            )
        # What the file itself says about truncation and padding belongs to whoever wrote it: the spec decides.
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec.max_length)
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # A worker process of a data loader makes its own tokenizer.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _image_spec(self) -> ImageSpec:
        if self.image is None:
            raise UsageError("this model reads no images")
        return self.image

    def _text_spec(self) -> TextSpec:
        if self.text is None:
            raise UsageError("this model reads no text")
        return self.text


class _TokenizerError(Exception):
    pass


def _rust(call: Callable[[str], T], text: str) -> T:
    """Call the tokenizers library, whose errors are bare Exceptions and whose panics are not even those."""
    try:
        return call(text)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _TokenizerError(_one_line(error)) from error
        raise


def check_text(text: object) -> str:
    """Return ``text`` if a tokenizer may see it.

    Raises:
        MediaError: not a string, blank, too long, or with characters that no text has.
    """
    if not isinstance(text, str):
        raise MediaError("text", received=type(text).__name__, expected="a string")
    if not text.strip():
        raise MediaError("text is empty", expected="at least one word")
    if len(text) > MAX_TEXT_CHARS:
        raise MediaError(
            "text is too long", received=f"{len(text):,} characters", expected=f"at most {MAX_TEXT_CHARS:,}"
        )
    if "\0" in text:
        raise MediaError(f"text holds a NUL character at position {text.index(chr(0)):,}", todo="remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MediaError(
            f"text holds half of a surrogate pair at position {error.start:,}",
            expected="valid Unicode",
            todo="remove it",
        ) from error
    return text


def describe(source: object) -> str:
    """What an error message calls an image source."""
    if isinstance(source, str | os.PathLike):
        return f"image {os.fspath(source)}"
    return "image given as a Pillow image" if isinstance(source, Image.Image) else "image given as an array"


def _jsonable(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}


def _open(source: ImageSource, name: str) -> Image.Image:
    """A decoded Pillow image whose size is within the limits."""
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str | os.PathLike):
        image = _open_file(Path(source), name)
    else:
        raise MediaError(
            "image", received=type(source).__name__, expected="a path, a Pillow image or a uint8 array (H, W, 3)"
        )
    try:
        _check_size(*image.size, name)
        image.load()
    except MediaError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise MediaError(
            f"{name} cannot be decoded", received=_one_line(error), expected="a complete image file"
        ) from error
    return image


def _open_file(path: Path, name: str) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise MediaError(f"{name} is empty (0 bytes)")
        return Image.open(path, formats=FORMATS)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large", expected=_LIMITS) from error
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise MediaError(f"{name} is a folder", expected="an image file") from error
    except PermissionError as error:
        raise MediaError(f"{name} cannot be read", received="permission denied") from error
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image that can be read", expected=f"one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as in _open
        raise MediaError(f"{name} cannot be read", received=_one_line(error)) from error


_LIMITS = f"1 to {MAX_SIDE:,} pixels a side and at most {MAX_PIXELS // 1_000_000} megapixels"


def _check_size(width: int, height: int, name: str) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise MediaError(
            f"{name} is outside the limits of size", received=f"{width:,} x {height:,} pixels", expected=_LIMITS
        )


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped:
        raise MediaError(
            name, received=f"{array.dtype} {array.shape}", expected="uint8 (H, W), (H, W, 3) RGB or (H, W, 4) RGBA"
        )
    _check_size(array.shape[1], array.shape[0], name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright 8-bit RGB, transparency composited on white."""
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion would clip at 255 instead of scaling; older Pillow opens such files as 32-bit "I".
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(
            f"{name} has 32-bit {'float' if image.mode == 'F' else 'integer'} pixels, whose range is unknown",
            expected="8 or 16 bits",
            todo="convert it first",
        )
    try:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
            return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # a colour space without a conversion, a damaged palette
        raise MediaError(
            f"{name} cannot be converted to RGB", received=f"mode {image.mode}: {_one_line(error)}"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # unreadable EXIF beside readable pixels: as every viewer does, shown as stored
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _fit(image: Image.Image, spec: ImageSpec, name: str) -> NDArray[np.uint8]:
    """Resize and crop as timm's evaluation transform does, roundings and all."""
    width, height = image.size
    target_h, target_w = spec.resize_height, spec.resize_width
    if spec.crop_mode == "squash":
        new_h, new_w = target_h, target_w
    elif spec.crop_mode == "center" and target_h == target_w:
        new_h = target_h if height <= width else int(target_h * height / width)
        new_w = target_h if width <= height else int(target_h * width / height)
    else:
        pick = max if spec.crop_mode == "border" else min
        ratio = pick(height / target_h, width / target_w)
        new_h, new_w = round(height / ratio), round(width / ratio)
    if not (new_h >= 1 and new_w >= 1 and new_h * new_w <= MAX_PIXELS):
        raise MediaError(
            f"{name} is too narrow to be resized",
            received=f"{width:,} x {height:,} pixels, which would become {new_w:,} x {new_h:,}",
            expected=f"1 to {MAX_PIXELS // 1_000_000} megapixels after resizing",
            todo="crop it first",
        )
    if (new_w, new_h) != (width, height):
        image = image.resize((new_w, new_h), _FILTERS[spec.interpolation])
    fill = tuple(round(255 * m) for m in spec.mean) if spec.crop_mode == "border" else (0, 0, 0)
    return _center_crop(np.asarray(image), spec.height, spec.width, fill)


def _center_crop(pixels: NDArray[np.uint8], height: int, width: int, fill: tuple[int, ...]) -> NDArray[np.uint8]:
    """(h, w, 3) → (height, width, 3), padded with ``fill`` where it is smaller; halves rounded as torchvision does."""
    h, w, _ = pixels.shape
    if h < height or w < width:
        top, left = max(height - h, 0) // 2, max(width - w, 0) // 2
        padded = np.empty((max(h, height), max(w, width), 3), np.uint8)
        padded[:] = fill
        padded[top : top + h, left : left + w] = pixels
        pixels, (h, w) = padded, padded.shape[:2]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return np.array(pixels[top : top + height, left : left + width], order="C")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
