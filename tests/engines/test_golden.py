"""What golden samples refuse, whatever a manifest allows, and the sizes they are run at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.golden import MOST_TOLERANCE, check_outputs_are_golden, first_wrong_label
from mope_deploy.engines.replay import greatest_sizes, replays
from mope_deploy.errors import BundleError, EngineError, ParityError
from mope_deploy.manifest import TensorSpec
from mope_deploy.task import MultiLabel, SingleLabel
from tests.device import tiny
from tests.engines.conftest import make_bundle

Change = Callable[[NDArray[Any]], NDArray[Any]]


class Wrong:
    """A session that is right but for one of its outputs."""

    least_tolerance, name, device = 0.0, "onnxruntime", "a test"

    def __init__(self, bundle: Bundle, output: str, change: Change) -> None:
        self._session = open_session(bundle, engine="onnxruntime", threads=1)
        self.inputs, self._output, self._change = self._session.inputs, output, change

    def run(self, feeds: Any, outputs: Any = None) -> Any:
        found = self._session.run(feeds, outputs)
        return found | {self._output: self._change(found[self._output])}


@pytest.fixture(scope="module")
def lenient(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of an int8 graph whose tolerances were made of large errors, as an earlier release wrote it."""
    folder = tmp_path_factory.mktemp("lenient") / "bundle"
    return make_bundle(folder, tiny_graph, tolerance={"logits": 1.0, "routing": 1.0})


@pytest.mark.parametrize(
    ("output", "change"),
    [
        ("logits", np.zeros_like),
        ("logits", lambda a: a * np.float32(0.25)),
        ("logits", lambda a: -a),
        ("logits", lambda a: np.roll(a, 1, axis=1)),
        ("logits", lambda a: np.full_like(a, a.mean())),
        ("routing", np.zeros_like),
        ("routing", lambda a: np.eye(tiny.EXPERTS, dtype=np.float32)[np.argmin(a, axis=-1)]),
    ],
)
def test_no_tolerance_lets_these_through(lenient: Bundle, output: str, change: Change) -> None:
    with pytest.raises(ParityError, match=f"graph model: {output} are not the golden ones"):
        check_outputs_are_golden(lenient, Wrong(lenient, output, change), graph="model")


def test_what_a_tolerance_is_for(lenient: Bundle) -> None:
    largest = float(np.abs(lenient.golden()[1]["logits"]).max())

    def off(a: NDArray[Any]) -> NDArray[Any]:
        return a + np.float32(0.9 * MOST_TOLERANCE.logits * largest)

    measured = check_outputs_are_golden(lenient, Wrong(lenient, "logits", off), graph="model")
    assert measured.logits_error == pytest.approx(0.09, rel=1e-4)
    assert measured.batches == len(tiny.SAMPLES) + 2
    once = check_outputs_are_golden(lenient, Wrong(lenient, "logits", off), graph="model", sizes=False)
    assert once.batches == 1


def test_nothing_that_was_kept_of_an_earlier_batch_proves_a_part(lenient: Bundle) -> None:
    session = open_session(lenient, engine="onnxruntime", threads=1)
    session.uncached = Wrong(lenient, "logits", np.zeros_like)  # type: ignore[attr-defined]
    with pytest.raises(ParityError, match="logits are not the golden ones"):
        check_outputs_are_golden(lenient, session, graph="model")


def test_golden_logits_that_are_zero_prove_nothing(tiny_graph: Path, tmp_path: Path) -> None:
    files = tiny.files(tiny_graph)
    outputs = {"logits": np.zeros((6, 3), np.float32), "routing": np.zeros((6, 3, 4), np.float32)}
    files["golden/outputs.npz"] = tiny.npz(outputs)
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest())
    with pytest.raises(BundleError, match="received logits that are all 0"):
        check_outputs_are_golden(bundle, Wrong(bundle, "logits", np.zeros_like), graph="model")


def test_labels_that_are_no_near_ties_agree() -> None:
    one, many = SingleLabel(("a", "b", "c")), MultiLabel(("a", "b", "c"))
    golden = np.array([[2.0, 1.9, 0.0], [0.0, 1.0, -1.0]])
    near, wrong = np.array([[1.9, 2.0, 0.0], [0.0, 1.0, -1.0]]), np.array([[2.0, 1.9, 0.0], [1.0, 0.9, -1.0]])
    assert first_wrong_label(one, near, golden, limit=0.2) == ""
    assert first_wrong_label(one, wrong, golden, limit=0.2) == "row 1: label is a; expected b, which leads by 1"
    assert first_wrong_label(many, wrong, golden, limit=0.2) == ""  # 0 is at the threshold
    assert first_wrong_label(many, -wrong, golden, limit=0.2).startswith("row 0: label a is no; expected yes")


SPECS = (
    TensorSpec("pixel_values", "float32", ("batch", 3, 2, 2)),
    TensorSpec("input_ids", "int64", ("batch", "text_length")),
    TensorSpec("attention_mask", "int64", ("batch", "text_length")),
)


def golden_inputs() -> dict[str, NDArray[Any]]:
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    ids = np.arange(1, 13).reshape(3, 4) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": np.arange(36, dtype=np.float32).reshape(3, 3, 2, 2),
    }


def test_sizes_of_replays() -> None:
    found = list(replays(golden_inputs(), SPECS, greatest={"batch": 7, "text_length": 6}, pad_id=9))
    assert [one.feeds["input_ids"].shape for one in found] == [(3, 4), (1, 4), (1, 1), (1, 2), (7, 6)]
    assert found[-1].rows.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found[-1].feeds["input_ids"][1].tolist() == [5, 9, 9, 9, 9, 9]
    assert found[-1].feeds["attention_mask"][4].tolist() == [1, 0, 0, 0, 0, 0]
    for one in found:
        for row, sample in enumerate(one.rows):
            np.testing.assert_array_equal(one.feeds["pixel_values"][row], golden_inputs()["pixel_values"][sample])
    assert found[-1].name == "a batch of 7 at text_length 6"


def test_samples_that_an_engine_is_too_short_for_are_left_out() -> None:
    found = list(replays(golden_inputs(), SPECS, greatest={"batch": 3, "text_length": 2}))
    assert [one.feeds["input_ids"].shape for one in found] == [(2, 2), (1, 1), (1, 2), (3, 2)]
    assert [one.rows.tolist() for one in found] == [[1, 2], [1], [2], [1, 2, 1]]
    for one in found:
        for row, sample in enumerate(one.rows):
            np.testing.assert_array_equal(one.feeds["pixel_values"][row], golden_inputs()["pixel_values"][sample])
    with pytest.raises(EngineError, match="every golden sample is longer than this engine takes; expected at most"):
        next(replays(golden_inputs(), SPECS, greatest={"batch": 3, "text_length": 0}))


def test_greatest_sizes() -> None:
    exported, built = {"batch": 2, "text_length": 3}, {"batch": 2, "text_length": 5}
    assert greatest_sizes(tiny.TEXT, None, 6, engine={}, bundle={}) == {"batch": 6, "text_length": 12}
    assert greatest_sizes(tiny.TEXT, None, 6, engine={}, bundle=exported) == {"batch": 6, "text_length": 12}
    assert greatest_sizes(tiny.TEXT, None, 6, engine={}, bundle={"batch": 16}) == {"batch": 16, "text_length": 12}
    assert greatest_sizes(tiny.TEXT, None, 6, engine=built, bundle=exported) == built


def test_the_greatest_batch_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row = sum(array[:1].nbytes for array in golden_inputs().values())
    monkeypatch.setattr("mope_deploy.engines.replay.MAX_REPLAY_BYTES", 5 * row)
    *_, last = replays(golden_inputs(), SPECS, greatest={"batch": 4096, "text_length": 4})
    assert len(last.rows) == 5
    monkeypatch.setattr("mope_deploy.engines.replay.MAX_REPLAY_BYTES", 0)
    *_, last = replays(golden_inputs(), SPECS, greatest={"batch": 4096, "text_length": 4})
    assert len(last.rows) == 1
