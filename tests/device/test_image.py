"""Everything between a picture and the encoder's array. (Equality with timm's transform: test_against_timm.py.)"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mope_deploy import limits
from mope_deploy.errors import MediaError, MopeError, UsageError
from mope_deploy.preprocess import ImageSpec, Preprocessing
from tests.device import tiny

pytestmark = pytest.mark.device


# Nothing is resized or cropped, so that what comes before is seen pixel by pixel.
PLAIN = Preprocessing(ImageSpec(4, 6, 4, 6, "squash", "nearest", (0.5,) * 3, (0.5,) * 3), None)


RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def load(source: Any) -> np.ndarray:
    return PLAIN.load_image(source)


def refused(source: Any, *words: str, using: Preprocessing = PLAIN) -> None:
    with pytest.raises(MediaError) as caught:
        using.load_image(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sources_agree(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), RGB):
        found = load(source)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, RGB)


def test_result_is_the_callers_own() -> None:
    source = RGB.copy()
    load(source)[:] = 0
    np.testing.assert_array_equal(source, RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The file says how it is to be turned; Pillow's own exif_transpose is the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    spec = replace(PLAIN.image, height=upright.shape[0], width=upright.shape[1])
    spec = replace(spec, resize_height=spec.height, resize_width=spec.width)
    np.testing.assert_array_equal(Preprocessing(spec, None).load_image(path), upright)
    assert (upright.shape != RGB.shape) == (orientation >= 5)


def test_damaged_exif_leaves_the_picture_readable(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load(tmp_path / "a.png"), RGB)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    alpha = np.zeros((4, 6, 1), np.uint8)
    alpha[:, 3:] = 255
    rgba = np.concatenate([RGB, alpha], axis=2)
    want = RGB.copy()
    want[:, :3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png"), want)
    np.testing.assert_array_equal(load(rgba), want)
    half = np.zeros((4, 6, 4), np.uint8)
    half[..., 3] = 128
    assert set(np.unique(load(half))) == {127}  # black at 128/255 on white


def test_palette_with_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (6, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((2, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    found = load(tmp_path / "a.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 2].tolist() == [200, 100, 50]


def test_greys(tmp_path: Path) -> None:
    grey = RGB[:, :, 0]
    for source in (grey, grey[:, :, None], Image.fromarray(grey)):
        np.testing.assert_array_equal(load(source), np.repeat(grey[:, :, None], 3, 2))
    bits = Image.fromarray(grey > 127)
    assert set(np.unique(load(bits))) == {0, 255}
    Image.merge("LA", [Image.fromarray(grey), Image.new("L", (6, 4), 0)]).save(tmp_path / "la.png")
    assert set(np.unique(load(tmp_path / "la.png"))) == {255}


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = [0, 127, 129, 257, 300, 32767, 32768, 65278, 65279, 65535]
    wide = np.resize(np.array(values, np.uint16), (4, 6))
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 6 4 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(path)
    want = np.array([[round(int(v) / 257) for v in row] for row in wide], np.uint8)
    np.testing.assert_array_equal(load(path), np.repeat(want[:, :, None], 3, 2))


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    for suffix in ("jpg", "tif"):
        image.save(tmp_path / f"a.{suffix}")
        red, green, blue = load(tmp_path / f"a.{suffix}")[2, 3].tolist()
        assert red > 245
        assert green < 10
        assert blue < 10


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert Image.open(tmp_path / f"a.{suffix}").n_frames == 3
    assert load(tmp_path / f"a.{suffix}")[2, 3].tolist() == [255, 0, 0]


def test_pixels_without_a_known_range_are_refused() -> None:
    refused(Image.new("F", (6, 4)), "32-bit float", "8 or 16 bits")
    refused(Image.new("I", (6, 4)), "32-bit integer")


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "a.png")
    assert (load(tmp_path / "a.png") == (7, 8, 9)).all()
    assert tiny.preprocessing().load_image(tmp_path / "a.png").shape == (8, 8, 3)


def bmp_header(width: int, height: int) -> bytes:
    """A picture that has a header and no pixels: refused for its size, it was refused before any was decoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("size", [(20_000, 3), (3, 20_000), (12_000, 12_000), (16_384, 16_384), (2**31 - 1, 2**31 - 1)])
def test_limits_are_checked_in_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.bmp").write_bytes(bmp_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "a.bmp", "a.bmp", "16,384", "100 megapixels")


def test_largest_side_is_accepted(tmp_path: Path) -> None:
    Image.new("L", (limits.MAX_SIDE, 2), 9).save(tmp_path / "a.png")
    assert (load(tmp_path / "a.png") == 9).all()
    Image.new("L", (limits.MAX_SIDE + 1, 2), 9).save(tmp_path / "b.png")
    refused(tmp_path / "b.png", "16,385 x 2")


def test_resizing_may_not_explode(tmp_path: Path) -> None:
    """A sliver whose shorter side is scaled up would need gigabytes."""
    Image.new("L", (1, 16_000)).save(tmp_path / "a.png")
    tall = Preprocessing(replace(PLAIN.image, crop_mode="center", resize_height=256, resize_width=256), None)
    refused(tmp_path / "a.png", "a.png", "256 x 4,096,000", using=tall)
    fits = Preprocessing(replace(PLAIN.image, crop_mode="border"), None)
    refused(tmp_path / "a.png", "too narrow", using=fits)


def test_unusable_files(tmp_path: Path) -> None:
    good = tiny.png(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)))
    jpeg = io.BytesIO()
    Image.fromarray(RGB).resize((64, 64)).save(jpeg, "JPEG")
    zero = bytearray(good)
    zero[16:24] = bytes(8)  # width and height of the PNG header
    for name, data, words in (
        ("empty.png", b"", "0 bytes"),
        ("text.png", b"not an image at all", "not an image"),
        ("short.png", good[: len(good) // 2], "cannot be decoded"),
        ("short.jpg", jpeg.getvalue()[:-200], "cannot be decoded"),
        ("header.png", good[:20], ""),
        ("zero.png", bytes(zero), ""),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image"),
        ("icon.png", b"\x00\x00\x01\x00\x01\x00", "not an image"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name, words)
    refused(tmp_path / "absent.png", "absent.png", "does not exist")
    refused(tmp_path, "folder")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(bytes(flipped))
    refused(tmp_path / "flipped.png", "flipped.png")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 6, 3), np.float32), "float32 (4, 6, 3)"),
        (np.zeros((3, 4, 6), np.uint8), "uint8 (3, 4, 6)"),
        (np.zeros((2, 4, 6, 3), np.uint8), "(2, 4, 6, 3)"),
        (np.zeros((0, 6, 3), np.uint8), "6 x 0 pixels"),
        (np.zeros((20_000, 1), np.uint8), "1 x 20,000"),
        (b"bytes", "bytes"),
        (None, "NoneType"),
    ],
)
def test_unusable_arrays(source: Any, words: str) -> None:
    refused(source, words)


def test_every_cut_and_every_flip_is_one_clear_error_or_a_picture(tmp_path: Path) -> None:
    """Damage of any kind never shows itself as another exception."""
    pictures = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(RGB).save(buffer, kind)
        pictures[kind] = buffer.getvalue()
    draw, refusals = np.random.default_rng(5), []
    for kind, good in pictures.items():
        for trial in range(60):
            bad = bytearray(good)
            if trial % 2:
                bad = bad[: draw.integers(1, len(good))]
            else:
                bad[draw.integers(len(good))] ^= 1 << draw.integers(8)
            path = tmp_path / f"{trial}.{kind}"
            path.write_bytes(bytes(bad))
            try:
                load(path)
            except MediaError as error:
                refusals.append((path.name, str(error)))
    assert len(refusals) > 60
    assert all(name in message and "\n" not in message for name, message in refusals)


def test_normalise() -> None:
    spec = ImageSpec(4, 6, 4, 6, "squash", "nearest", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = Preprocessing(spec, None).normalise(RGB[None])
    assert found.dtype == np.float32
    assert found.shape == (1, 3, 4, 6)
    for channel in range(3):
        for row in range(4):
            for column in range(6):
                value = np.float32(RGB[row, column, channel]) / np.float32(255)
                value = (value - np.float32(spec.mean[channel])) / np.float32(spec.std[channel])
                assert found[0, channel, row, column] == value
    for wrong in (RGB, RGB[None].astype(np.float32), RGB[None, :2]):
        with pytest.raises(UsageError, match="uint8"):
            PLAIN.normalise(wrong)


def test_from_timm_refuses_what_it_cannot_follow() -> None:
    config = {
        "input_size": (3, 8, 8),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    assert asdict(ImageSpec.from_timm(config))["resize_height"] == 8
    for change in ({"input_size": (1, 8, 8)}, {"interpolation": "random"}, {"mean": (0.5,)}):
        with pytest.raises(MopeError):
            ImageSpec.from_timm({**config, **change})
