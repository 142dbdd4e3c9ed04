"""Golden samples cover the labels, keep their pixels and never sit on a near-tie."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.gate.reference import eager_outputs
from export.pack.golden import SAMPLES, golden_samples, make_golden, pick_samples
from mope_deploy.data import Sample, open_samples
from mope_deploy.errors import DataError
from tests.export.conftest import Export
from tests.export.runs import write_data
from tests.tiny import LABELS


def test_every_label_has_a_sample_if_there_is_room(exports: dict[str, Export], tmp_path: Path) -> None:
    model = exports["dense"].model
    data = write_data(tmp_path / "data", labels=(*["neutral"] * 20, "entailment", "contradiction"))
    samples = list(open_samples(data))
    chosen = golden_samples(model, samples, 5)
    assert {sample.label for sample in chosen} == set(LABELS)
    assert len({sample.line for sample in chosen}) == 5
    assert len(golden_samples(model, samples, 2)) == 2
    assert len(golden_samples(model, samples[:3], 8)) == 3


def test_samples_are_drawn_from_the_whole_file_by_seed(exports: dict[str, Export], data: Path) -> None:
    model = exports["dense"].model
    first, again, other = (pick_samples(data, model, 20, seed=seed) for seed in (0, 0, 1))
    assert [s.line for s in first] == [s.line for s in again] != [s.line for s in other]
    assert max(s.line for s in first) > 40
    assert len(pick_samples(data, model, 1000)) == 70


def test_an_empty_file_is_named(exports: dict[str, Export], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"none\.jsonl has no rows"):
        pick_samples(tmp_path / "none.jsonl", exports["dense"].model, 5)


def test_a_bad_row_is_named_by_file_and_line(exports: dict[str, Export], data: Path, tmp_path: Path) -> None:
    file = data.parent / "bad.jsonl"
    file.write_text(
        data.read_text().splitlines()[0] + '\n{"image": "pictures/none.png", "text": "a", "label": "neutral"}\n'
    )
    with pytest.raises(DataError, match=r"bad\.jsonl:2: image .* does not exist"):
        pick_samples(file, exports["dense"].model, 5)


def test_near_ties_of_expert_selection_are_left_out(exports: dict[str, Export], data: Path) -> None:
    model = exports["top2"].model
    samples = list(open_samples(data))
    chosen = golden_samples(model, samples, 8)
    batch = model.preprocessing.collate([sample.load(model.preprocessing) for sample in chosen])
    ordered = -np.sort(-eager_outputs(model, batch)["soft"], axis=-1)
    assert (ordered[..., 1] - ordered[..., 2]).min() > 1e-3


def test_stored_pictures_give_exactly_the_stored_arrays(exports: dict[str, Export], data: Path) -> None:
    model = exports["dense"].model
    golden = make_golden(model, list(open_samples(data))[:5], outputs=("logits", "routing"))
    rows = [json.loads(line) for line in golden.files[SAMPLES].decode().splitlines()]
    loaded = [
        {"image": model.preprocessing.load_image(Image.open(io.BytesIO(golden.files[f"golden/{row['image']}"])))}
        | {"text": row["text"]}
        for row in rows
    ]
    for name, array in model.preprocessing.collate(loaded).items():
        assert array.tobytes() == golden.inputs[name].tobytes()
    for name, array in eager_outputs(model, golden.inputs).items():
        assert name in ("soft", "scores") or np.array_equal(array, golden.outputs[name])
    stored = np.load(io.BytesIO(golden.files["golden/outputs.npz"]))
    assert set(stored.files) == {"logits", "routing"}
    assert stored["logits"].dtype == np.float32


def test_pictures_are_stored_upright_lossless_and_without_metadata(exports: dict[str, Export], tmp_path: Path) -> None:
    model = exports["dense"].model
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010E] = "where and when"
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "alpha.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.gif", transparency=3)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(pixels[..., 0] > 127).save(tmp_path / "bits.png")
    Image.fromarray(pixels).resize((3000, 1500), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    names = ("turned.jpg", "cmyk.tif", "alpha.png", "palette.gif", "grey16.png", "bits.png", "large.png")
    samples = [Sample(tmp_path / name, "a red card", "neutral", i, tmp_path / "x") for i, name in enumerate(names)]
    golden = make_golden(model, samples, outputs=("logits",))
    for i, name in enumerate(names):
        png = golden.files[f"golden/{i}.png"]
        assert png.startswith(b"\x89PNG")
        assert b"where and when" not in png
        again = model.preprocessing.load_image(Image.open(io.BytesIO(png)))
        # What the model gets comes from the stored picture, even where that is smaller than the original.
        assert np.array_equal(golden.inputs["pixel_values"][i], model.preprocessing.normalise(again[None])[0]), name
        if name != "large.png":
            assert np.array_equal(again, model.preprocessing.load_image(tmp_path / name)), name
    assert max(Image.open(io.BytesIO(golden.files["golden/6.png"])).size) == 1024
    assert not np.array_equal(again, model.preprocessing.load_image(tmp_path / "large.png"))


def test_a_large_picture_of_any_mode_is_shrunk_as_it_is_prepared(exports: dict[str, Export], tmp_path: Path) -> None:
    """Sixteen bits of grey were clipped to white, and one bit stays black or white, when Pillow shrinks them."""
    model = exports["dense"].model
    grey = np.tile(np.linspace(0, 255, 1200).astype(np.uint16), (1100, 1))
    Image.fromarray(grey * 257).save(tmp_path / "grey16.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey8.png")
    bits = grey % 2 == 0
    Image.fromarray(bits).save(tmp_path / "bits.png")
    Image.fromarray(bits.astype(np.uint8) * 255).save(tmp_path / "bytes.png")
    names = ("grey16.png", "grey8.png", "bits.png", "bytes.png")
    samples = [Sample(tmp_path / name, "a red card", "neutral", i, tmp_path / "x") for i, name in enumerate(names)]
    made = make_golden(model, samples, outputs=("logits",)).inputs["pixel_values"]
    assert made[0].std() > 0.1
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[2], made[3])
