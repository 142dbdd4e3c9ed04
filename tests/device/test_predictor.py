"""From raw inputs to labels; the reference is the float64 oracle on independently prepared arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mope_deploy
from mope_deploy.bundle import write_bundle
from mope_deploy.data import open_samples
from mope_deploy.errors import BundleError, DataError, EngineError, MediaError, ParityError, UsageError
from mope_deploy.predictor import Prediction, Predictor, load
from mope_deploy.preprocess import ImageSpec
from tests.device import tiny
from tests.device.damage import exchange

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def predictor(bundle_path: Path) -> Predictor:
    return load(bundle_path, threads=1)


def pictures() -> list[Image.Image]:
    return [tiny.picture(i, size) for i, (_, size) in enumerate(tiny.SAMPLES)]


TEXTS = [text for text, _ in tiny.SAMPLES]


def expected(index: int) -> dict[str, np.ndarray]:
    """The oracle's view of one sample, alone."""
    inputs = tiny.preprocessing().collate([{"image": pictures()[index], "text": TEXTS[index]}])
    return {name: array[0] for name, array in tiny.oracle(inputs).items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def same(a: Prediction, b: Prediction) -> None:
    assert (a.label, a.notices) == (b.label, b.notices)
    np.testing.assert_allclose(list(a.probabilities.values()), list(b.probabilities.values()), atol=1e-6)


def test_one_sample(predictor: Predictor) -> None:
    for i in range(len(TEXTS)):
        found = predictor.predict(image=pictures()[i], text=TEXTS[i], routing=True)
        want = expected(i)
        probabilities = softmax(want["logits"])
        assert found.label == tiny.LABELS[int(probabilities.argmax())]
        assert list(found.probabilities) == list(tiny.LABELS)
        np.testing.assert_allclose(list(found.probabilities.values()), probabilities, atol=1e-6)
        assert found.probability == found.probabilities[found.label] == max(found.probabilities.values())
        assert sum(found.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
        assert found.routing.shape == (tiny.LAYERS, tiny.EXPERTS)
        np.testing.assert_allclose(found.routing, want["routing"], atol=1e-6)


def test_all_kinds_of_images(predictor: Predictor, tmp_path: Path) -> None:
    image = pictures()[0]
    image.save(tmp_path / "a.png")
    wanted = predictor.predict(image=image, text="red")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image)):
        assert predictor.predict(image=source, text="red") == wanted


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_lists_give_what_single_calls_give(predictor: Predictor, batch_size: int) -> None:
    found = predictor.predict(image=pictures(), text=TEXTS, batch_size=batch_size)
    assert len(found) == len(TEXTS)
    for i, one in enumerate(found):
        same(one, predictor.predict(image=pictures()[i], text=TEXTS[i]))
    backwards = predictor.predict(image=pictures()[::-1], text=TEXTS[::-1], batch_size=batch_size)
    for one, other in zip(found, backwards[::-1], strict=True):
        same(one, other)


def test_broadcast(predictor: Predictor) -> None:
    for one, image in zip(predictor.predict(image=pictures(), text="red"), pictures(), strict=True):
        same(one, predictor.predict(image=image, text="red"))
    for one, text in zip(predictor.predict(image=pictures()[0], text=tuple(TEXTS)), TEXTS, strict=True):
        same(one, predictor.predict(image=pictures()[0], text=text))
    assert len(predictor.predict(image=[pictures()[0]], text="red")) == 1
    assert predictor.predict(image=[], text="red") == []


def test_a_single_input_beside_a_list_is_loaded_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = ImageSpec.load
    monkeypatch.setattr(ImageSpec, "load", lambda self, image, **k: calls.append(image) or load(self, image, **k))
    predictor.predict(image=pictures()[0], text=TEXTS)
    assert len(calls) == 1


def test_notices(predictor: Predictor) -> None:
    found = predictor.predict(image=[pictures()[0]] * 3, text=["red", "red " * 10_000, "blue"])
    assert [one.notices for one in found] == [(), ("text truncated from 10,002 to 12 tokens",), ()]


def test_misuse(predictor: Predictor) -> None:
    image = pictures()[0]
    for given, words in (
        ({}, "image is missing; expected image and text"),
        ({"image": image}, "text is missing"),
        ({"text": "red"}, "image is missing"),
        ({"image": [image] * 2, "text": ["red"] * 3}, "2 of image, 3 of text"),
        ({"image": image, "text": "red", "batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=words):
            predictor.predict(**given)


def test_bad_items_of_a_list_are_named_by_position(predictor: Predictor) -> None:
    image = pictures()[0]
    with pytest.raises(MediaError, match=r"image\[1\]: image nowhere\.png does not exist"):
        predictor.predict(image=[image, "nowhere.png"], text="red")
    with pytest.raises(MediaError, match=r"text\[2\]: text is empty"):
        predictor.predict(image=image, text=["red", "blue", " "])
    with pytest.raises(MediaError, match=r"^image nowhere\.png does not exist"):
        predictor.predict(image="nowhere.png", text="red")


def test_to_dict(predictor: Predictor) -> None:
    found = predictor.predict(image=pictures()[0], text="red " * 50, routing=True).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["label", "probability", "probabilities", "routing", "notices"]
    assert "routing" not in predictor.predict(image=pictures()[0], text="red").to_dict()


def test_stream(predictor: Predictor, data_file: Path) -> None:
    samples = open_samples(data_file)
    found = list(predictor.predict_batches(samples, batch_size=4))
    assert [sample.line for sample, _ in found] == list(range(1, 7))
    for i, (_, one) in enumerate(found):
        same(one, predictor.predict(image=pictures()[i], text=TEXTS[i]))
    some = list(samples)[2:4]
    assert [sample.line for sample, _ in predictor.predict_batches(some)] == [3, 4]


def test_stream_skips_what_cannot_be_used(predictor: Predictor, data_file: Path) -> None:
    (data_file.parent / "2.png").write_bytes((data_file.parent / "2.png").read_bytes()[:70])
    (data_file.parent / "4.png").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl:3: "):
        list(predictor.predict_batches(open_samples(data_file), batch_size=2))
    samples = open_samples(data_file, skip_bad=True)
    assert [sample.line for sample, _ in predictor.predict_batches(samples, batch_size=2)] == [1, 2, 4, 6]
    assert len(samples.skipped) == 2


def test_stream_is_lazy(predictor: Predictor, data_file: Path) -> None:
    with data_file.open("a") as file:
        file.write("broken\n" * 3)
    stream = predictor.predict_batches(open_samples(data_file), batch_size=2)
    assert next(stream)[0].line == 1


@pytest.fixture
def multi_label(graph_file: Path, tmp_path: Path) -> Predictor:
    task = {"type": "multi-label", "labels": list(tiny.LABELS), "threshold": 0.45}
    bundle = write_bundle(tmp_path / "multi", files=tiny.files(graph_file), manifest=tiny.manifest(task=task))
    return load(bundle.path)


def test_multi_label(multi_label: Predictor) -> None:
    sizes = set()
    for i in range(len(TEXTS)):
        found = multi_label.predict(image=pictures()[i], text=TEXTS[i])
        probabilities = 1 / (1 + np.exp(-expected(i)["logits"]))
        np.testing.assert_allclose(list(found.probabilities.values()), probabilities, atol=1e-6)
        assert found.label == tuple(n for n, p in zip(tiny.LABELS, probabilities, strict=True) if p >= 0.45)
        assert found.probability is None
        assert "probability" not in found.to_dict()
        sizes.add(len(found.label))
    assert len(sizes) > 1


def test_probabilities_of_extreme_logits(
    predictor: Predictor, multi_label: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one, expected in ((predictor, [1.0, 0.0, 0.0]), (multi_label, [1.0, 0.0, 0.5])):
        monkeypatch.setattr(one.session, "run", lambda *_: {"logits": np.array([[1e4, -1e4, 0]], np.float32)})
        assert list(one.predict(image=pictures()[0], text="red").probabilities.values()) == expected


def test_nan_from_an_engine_is_an_error(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor.session, "run", lambda *_: {"logits": np.array([[np.nan, 0, 0]], np.float32)})
    with pytest.raises(EngineError, match="mope verify"):
        predictor.predict(image=pictures()[0], text="red")


def test_model_without_routing(graph_file: Path, bundle_path: Path) -> None:
    plain = load(bundle_path)
    object.__setattr__(plain.bundle.manifest, "routing", None)
    with pytest.raises(UsageError, match="no routing output"):
        plain.predict(image=pictures()[0], text="red", routing=True)


def test_load_checks_hashes_unless_told_not_to(bundle_copy: Path) -> None:
    data = bytearray((bundle_copy / "golden/0.png").read_bytes())
    data[-1] ^= 1
    (bundle_copy / "golden/0.png").write_bytes(bytes(data))
    with pytest.raises(BundleError, match="was altered"):
        load(bundle_copy)
    load(bundle_copy, verify=False)


def test_top_level_names() -> None:
    assert mope_deploy.load is load
    assert mope_deploy.Predictor is Predictor
    with pytest.raises(AttributeError):
        _ = mope_deploy.lod


# --- verify ---


def rewritten(path: Path, name: str, data: bytes) -> Path:
    """The bundle with one file exchanged, and its hash with it: only what is inside can give it away."""
    exchange(path, name, data)
    return path


def test_verify(predictor: Predictor) -> None:
    found = predictor.verify()
    assert (found.graph, found.samples, found.near_ties) == ("model", len(TEXTS), 0)
    assert 0 < found.logits_error < 1e-6
    assert 0 < found.routing_error < 1e-6


def test_golden_samples_may_have_labels(multi_label: Predictor, bundle_copy: Path) -> None:
    """Of the task's own form: names, or lists of names."""
    for path, label in ((multi_label.bundle.path, ["neutral", "entailment"]), (bundle_copy, "neutral")):
        rows = (path / "golden/samples.jsonl").read_text().splitlines()
        labelled = "\n".join(json.dumps({**json.loads(row), "label": label}) for row in rows)
        assert load(rewritten(path, "golden/samples.jsonl", labelled.encode())).verify().samples == len(TEXTS)


@pytest.mark.parametrize("name", ["logits", "routing"])
def test_verify_finds_other_outputs(bundle_copy: Path, name: str) -> None:
    outputs = load(bundle_copy).bundle.golden()[1]
    outputs[name] = outputs[name].copy()
    outputs[name].reshape(-1)[7] += 1e-4
    with pytest.raises(ParityError, match=f"{name} are not the golden ones; received an error of"):
        load(rewritten(bundle_copy, "golden/outputs.npz", tiny.npz(outputs))).verify()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_finds_golden_outputs_that_nothing_can_equal(bundle_copy: Path, value: float) -> None:
    outputs = load(bundle_copy).bundle.golden()[1]
    outputs["logits"] = np.full_like(outputs["logits"], value)
    with pytest.raises(BundleError, match="NaN or infinity"):
        load(rewritten(bundle_copy, "golden/outputs.npz", tiny.npz(outputs))).verify()


@pytest.mark.parametrize("name", ["pixel_values", "input_ids"])
def test_verify_finds_other_preprocessing(bundle_copy: Path, name: str) -> None:
    """By one unit in the last place of one pixel, or one token."""
    inputs = load(bundle_copy).bundle.golden()[0]
    flat = inputs[name].reshape(-1).copy()
    flat[5] = np.nextafter(flat[5], np.float32(9)) if name == "pixel_values" else flat[5] + 1
    inputs[name] = flat.reshape(inputs[name].shape)
    with pytest.raises(ParityError, match=f"does not give the golden {name}; received 1 of"):
        load(rewritten(bundle_copy, "golden/inputs.npz", tiny.npz(inputs))).verify()


def test_verify_finds_another_number_of_samples(bundle_copy: Path) -> None:
    rows = (bundle_copy / "golden/samples.jsonl").read_bytes().splitlines()
    with pytest.raises(ParityError, match="does not give the golden pixel_values; received shape"):
        load(rewritten(bundle_copy, "golden/samples.jsonl", b"\n".join(rows[:-1]))).verify()


def test_verify_finds_unusable_samples(bundle_copy: Path) -> None:
    for rows in (b"", b"broken", b'{"image": "missing.png", "text": "red"}'):
        with pytest.raises(BundleError):
            load(rewritten(bundle_copy, "golden/samples.jsonl", rows)).verify()
