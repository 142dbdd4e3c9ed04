"""Images as timm's own evaluation transform prepares them: exact equality, for several configurations and odd sizes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform, resolve_data_config

from mope_deploy.errors import MediaError
from mope_deploy.preprocess import ImageSpec, Preprocessing

SIZES = [(1, 1), (3, 500), (501, 7), (64, 64), (256, 256), (97, 131), (255, 257), (641, 480)]


def both(config: dict[str, Any]) -> tuple[Any, Preprocessing]:
    resolved = resolve_data_config({}, pretrained_cfg=config)
    return create_transform(**resolved, is_training=False), Preprocessing(ImageSpec.from_timm(resolved), None)


def ours(preparing: Preprocessing, source: Any) -> np.ndarray:
    return preparing.normalise(preparing.load_image(source)[None])[0]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(224, 224), (64, 64), (33, 47), (96, 64)])
def test_equal_to_the_last_bit(mode: str, size: tuple[int, int]) -> None:
    compared = 0
    for pct, interpolation in itertools.product([0.875, 0.95, 1.0], ["bilinear", "bicubic", "lanczos", "nearest"]):
        config = {"input_size": (3, *size), "crop_pct": pct, "crop_mode": mode, "interpolation": interpolation}
        transform, preparing = both(config)
        for width, height in SIZES:
            picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
            image = Image.fromarray(picture)
            try:
                want = transform(image).numpy()
            except ValueError:  # a sliver that timm shrinks to nothing
                with pytest.raises(MediaError, match="too narrow"):
                    preparing.load_image(image)
                continue
            found = ours(preparing, image)
            assert found.dtype == want.dtype == np.float32
            np.testing.assert_array_equal(found, want)
            compared += 1
    assert compared >= 80


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_base_patch4_window7_224", "vit_base_patch16_clip_224"])
def test_real_encoders_configurations(name: str) -> None:
    import timm

    transform, preparing = both(timm.get_pretrained_cfg(name).to_dict())
    for width, height in SIZES[-3:]:
        image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))
        np.testing.assert_array_equal(ours(preparing, image), transform(image).numpy())


def test_from_files_of_every_kind(tmp_path: Path) -> None:
    """What a timm user does with a file: ``transform(Image.open(path).convert("RGB"))``."""
    transform, preparing = both({"input_size": (3, 40, 40), "crop_pct": 0.9})
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 71, 3), np.uint8))
    for kind in ("png", "jpg", "bmp", "webp", "tif", "ppm"):
        image.save(tmp_path / f"a.{kind}")
    image.quantize(30).save(tmp_path / "a.gif")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for path in files:
        want = transform(Image.open(path).convert("RGB")).numpy()
        np.testing.assert_array_equal(ours(preparing, path), want, err_msg=path.name)
