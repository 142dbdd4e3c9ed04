"""Images → arrays, equal to timm's evaluation transform to the last bit, without importing timm or torch.

That is ``timm.data.create_transform(..., is_training=False)``: resize by Pillow, center crop, ``/255``,
``(x - mean) / std``, all in float32. What comes before it, from a file to 8-bit RGB, is stated here and in
docs/bundle.md:

- the first frame of an animation; EXIF orientation applied; palettes expanded; CMYK and YCbCr converted by Pillow;
- anything with transparency is composited on white;
- 16-bit greyscale is scaled to 8 bits (rounded); 32-bit integer and float images are refused, their range is unknown;
- at most 16,384 pixels a side and 100 megapixels in all, checked in the header before anything is decoded.

Letters: B batch · H, W height and width at the encoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mope_deploy.errors import ConfigError, MediaError, UsageError
from mope_deploy.fields import between, choice, decode
from mope_deploy.limits import MAX_PIXELS
from mope_deploy.preprocess.image_file import check_decoder, check_size, open_picture, plain_tags
from mope_deploy.preprocess.shared import Notice, Tensors, describe, one_line

__all__ = ["ImageSource", "ImageSpec", "check_size", "fit", "normalise", "upright_rgb"]

BACKGROUND = (255, 255, 255)  # what transparent pixels are composited on

_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_EXIF_ORIENTATION = 0x0112
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}

_Mean = Annotated[float, between(0, 1)]
_Std = Annotated[float, between(1e-6, 1e3)]
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

    height: Annotated[int, between(1, 4096)]
    width: Annotated[int, between(1, 4096)]
    resize_height: Annotated[int, between(1, 8192)]
    resize_width: Annotated[int, between(1, 8192)]
    crop_mode: Annotated[str, choice("center", "squash", "border")]
    interpolation: Annotated[str, choice(*_FILTERS)]
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]

    @property
    def tensors(self) -> Tensors:
        """What the encoder reads: name → dtype and axes."""
        return {"pixel_values": ("float32", ("batch", 3, self.height, self.width))}

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
        spec = {
            "height": height,
            "width": width,
            "resize_height": math.floor(height / crop),
            "resize_width": math.floor(width / crop),
            "crop_mode": config.get("crop_mode") or "center",
            "interpolation": config["interpolation"],
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
        }
        return cls.from_dict(spec, where="the image encoder's transform")

    @classmethod
    def from_dict(cls, value: object, *, where: str = "image") -> ImageSpec:
        """Strict: every key, no other, types and ranges checked.

        Raises:
            ConfigError: naming ``where`` and the key.
        """
        return decode(value, cls, where, ConfigError)

    def load(self, source: ImageSource, *, on_notice: Notice = lambda _: None) -> NDArray[np.uint8]:
        """Decode, turn upright, convert to RGB, resize and crop. Deterministic, so that training may cache it.

        Args:
            source: a path, a Pillow image, or a uint8 array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.
            on_notice: never called: an image is used whole.

        Returns:
            uint8 (height, width, 3) of the encoder, contiguous.

        Raises:
            MediaError: one line naming the file: missing, empty, not an image, truncated, outside the stated limits.
        """
        name = "image given as a Pillow image" if isinstance(source, Image.Image) else describe("image", source)
        image = _open(source, name)  # Pillow's warnings are left to the filters of the caller's process
        try:
            return fit(_to_rgb(image, name), self, name)
        finally:
            if image is not source:
                image.close()

    def batch(self, images: Sequence[NDArray[np.uint8] | None]) -> dict[str, NDArray[Any]]:
        """B results of :meth:`load` → ``pixel_values`` float32 (B, 3, H, W).

        None is an image that is missing: nothing of what stands in its place reaches the result.
        """
        black = np.zeros((self.height, self.width, 3), np.uint8)
        return {"pixel_values": normalise(np.stack([black if image is None else image for image in images]), self)}


def normalise(images: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """uint8 (…, H, W, 3) as :meth:`ImageSpec.load` returns them → float32 (…, 3, H, W), ``(x / 255 - mean) / std``."""
    if images.dtype != np.uint8 or images.ndim < 4 or images.shape[-3:] != (spec.height, spec.width, 3):
        expected = f"uint8 (B, {spec.height}, {spec.width}, 3) from load_image"
        raise UsageError("images to normalise", received=f"{images.dtype} {images.shape}", expected=expected)
    # One float32 rounding per step and in this order: what torchvision's ToTensor and Normalize do.
    x = np.ascontiguousarray(np.moveaxis(images, -1, -3)).astype(np.float32)  # (…, 3, H, W)
    x /= np.float32(255)
    x -= np.asarray(spec.mean, np.float32)[:, None, None]
    x /= np.asarray(spec.std, np.float32)[:, None, None]
    return x


def _open(source: ImageSource, name: str) -> Image.Image:
    """A decoded Pillow image whose size is within the limits."""
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if not isinstance(source, Image.Image | str | os.PathLike):
        expected = "a path, a Pillow image or a uint8 array (H, W, 3)"
        raise MediaError("image", received=type(source).__name__, expected=expected)
    image = source if isinstance(source, Image.Image) else open_picture(Path(source), name)
    check_size(*image.size, name)
    key = None if image is source else _transparent(image)  # what was given is not changed
    try:
        if image is source and getattr(image, "tile", None):  # opened by the caller, and not decoded yet
            check_decoder(image, _content(image), name)
        image.load()
    except MediaError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        what, received = f"{name} cannot be decoded", one_line(error)
        raise MediaError(what, received=received, expected="a complete image file") from error
    if key is not None:
        image.info["transparency"] = key
    return image


def _content(image: Image.Image) -> bytes:
    file: Any = image.fp  # type: ignore[attr-defined]
    before = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(before)
    return content


def _transparent(image: Image.Image) -> Any:
    """The colour that stands for transparency, as the decoded pixels will have it; None where there is none.

    A PNG states it in the file's own bits, and so does Pillow, while it decodes 2, 4 and 16 bits a channel to 8.
    """
    key, raw = image.info.get("transparency"), getattr(image, "tile", None)
    form = raw[0][3] if raw and image.format == "PNG" else None
    if form == "RGB;16B" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    if form in ("L;2", "L;4") and isinstance(key, int):
        return key * (85 if form == "L;2" else 17)
    return key


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped:
        expected = "uint8 (H, W), (H, W, 3) RGB or (H, W, 4) RGBA"
        raise MediaError(name, received=f"{array.dtype} {array.shape}", expected=expected)
    check_size(array.shape[1], array.shape[0], name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright 8-bit RGB, transparency composited on white."""
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion would clip at 255 instead of scaling; older Pillow opens such files as 32-bit "I".
        wide = np.asarray(image).astype(np.uint32)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            grey[wide == key] = BACKGROUND[0]
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        what = f"{name} has 32-bit {'float' if image.mode == 'F' else 'integer'} pixels, whose range is unknown"
        raise MediaError(what, expected="8 or 16 bits", todo="convert it first")
    try:
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
            return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # a colour space without a conversion, a damaged palette
        received = f"mode {image.mode}: {one_line(error)}"
        raise MediaError(f"{name} cannot be converted to RGB", received=received) from error


def upright_rgb(path: Path) -> Image.Image:
    """A picture as :meth:`ImageSpec.load` prepares it before it resizes: upright 8-bit RGB. Raises as that does."""
    name = describe("image", path)
    with _open(path, name) as image:
        return _to_rgb(image, name)


def _upright(image: Image.Image) -> Image.Image:
    exif = image.info.get("exif", b"")
    try:
        if not plain_tags(exif.removeprefix(b"Exif\0\0")):
            return image
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # unreadable EXIF beside readable pixels: as every viewer does, shown as stored
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def fit(image: Image.Image, spec: ImageSpec, name: str) -> NDArray[np.uint8]:
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
        image = image.resize((new_w, new_h), Image.Resampling[spec.interpolation.upper()])
    fill = tuple(round(255 * m) for m in spec.mean) if spec.crop_mode == "border" else (0, 0, 0)
    return _center_crop(np.asarray(image), spec.height, spec.width, fill)


def _center_crop(pixels: NDArray[np.uint8], height: int, width: int, fill: tuple[int, ...]) -> NDArray[np.uint8]:
    """(h, w, 3) → (height, width, 3), padded with ``fill`` where it is smaller; halves rounded as torchvision does."""
    h, w, _ = pixels.shape
    if h < height or w < width:
        top, left = max(height - h, 0) // 2, max(width - w, 0) // 2
        padded = np.full((max(h, height), max(w, width), 3), fill, np.uint8)
        padded[top : top + h, left : left + w] = pixels
        pixels, (h, w) = padded, padded.shape[:2]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return np.array(pixels[top : top + height, left : left + width], order="C")
