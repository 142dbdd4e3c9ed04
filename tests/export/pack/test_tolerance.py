"""What a device may be off by: never so much that golden samples prove nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.gate.device import describe, open_files
from export.gate.reference import eager_outputs
from export.pack.golden import Golden, golden_samples, make_golden
from export.pack.tolerance import golden_errors, golden_tolerance
from mope_deploy.data import open_samples
from mope_deploy.engines.golden import MOST_TOLERANCE
from mope_deploy.errors import ParityError
from tests.export.conftest import Export

LOGITS = np.array([[4.0, -1.0, 0.0], [-2.0, 3.0, 0.5], [0.0, -3.0, 1.0]], np.float32)


def golden(logits: Any = LOGITS) -> Golden:
    return Golden(files={}, inputs={}, outputs={"logits": np.asarray(logits, np.float32)})


@pytest.mark.parametrize(
    ("precision", "error", "wanted"),
    [("fp32", 1e-6, 1e-4), ("fp32", 5e-5, 5e-4), ("fp16", 1e-3, 0.01), ("int8", 0.02, 0.06), ("int8", 0.06, 0.1)],
)
def test_a_multiple_of_what_was_measured_within_bounds(precision: str, error: float, wanted: float) -> None:
    found = golden_tolerance("model", precision, {"logits": error, "routing": error}, golden())
    assert found.logits == pytest.approx(wanted)
    assert found.routing >= found.logits
    assert found.logits <= MOST_TOLERANCE.logits


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({"logits": 0.07, "routing": 0.0}, "received logits off by 0.07; expected at most 0.067"),
        ({"logits": 0.001, "routing": 0.2}, "received routing off by 0.2; expected at most 0.17"),
        ({"logits": float("nan")}, "received logits off by nan"),
    ],
)
def test_more_is_refused_in_one_line(errors: dict[str, float], words: str) -> None:
    with pytest.raises(ParityError, match="model-int8 is so far from the model that no device could be") as caught:
        golden_tolerance("model-int8", "int8", errors, golden())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_constant_answer_is_within_it() -> None:
    """Logits with a large share in common: a tenth of the largest would be all that tells samples apart."""
    logits = LOGITS + 100
    found = golden_tolerance("model", "int8", {"logits": 0.001}, golden(logits))
    best_constant = np.abs(logits - (logits.max(axis=0) + logits.min(axis=0)) / 2).max() / np.abs(logits).max()
    assert found.logits == pytest.approx(best_constant / 2, rel=1e-3)
    # Never below what the file needs here, nor below what float32 does.
    assert golden_tolerance("model", "int8", {"logits": 0.03}, golden(logits)).logits == pytest.approx(0.045)
    assert golden_tolerance("model", "fp32", {"logits": 0.0}, golden(np.ones((2, 3)))).logits == 1e-4


def test_samples_that_a_lower_precision_is_far_from_are_left_out(exports: dict[str, Export], data: Path) -> None:
    model, samples = exports["dense"].model, list(open_samples(data))
    plain = golden_samples(model, samples, 8)
    far = {sample.text for sample in plain[::2]}
    ids = {tuple(model.preprocessing.encode_text([text])["input_ids"][0].tolist()) for text in far}

    class Session:
        inputs = describe(exports["dense"].file, exports["dense"].config).inputs

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            found = eager_outputs(model, feeds)
            for row, (tokens, mask) in enumerate(zip(feeds["input_ids"], feeds["attention_mask"], strict=True)):
                if tuple(tokens[mask == 1].tolist()) in ids:
                    found["routing"][row] = 1 - found["routing"][row]
            return {name: found[name] for name in ("logits", "routing")}

    chosen = golden_samples(model, samples, 8, lowered=[Session()])  # type: ignore[list-item]
    assert len(chosen) == 8
    assert not far & {sample.text for sample in chosen}
    assert {sample.label for sample in chosen} == {sample.label for sample in plain}


def test_errors_are_measured_at_every_size(exports: dict[str, Export], data: Path) -> None:
    model, config = exports["dense"].model, exports["dense"].config
    made = make_golden(model, list(open_samples(data))[:4], outputs=config.outputs)
    session = open_files(exports["dense"].file, config)
    assert golden_errors(session, made, model.preprocessing)["logits"] < 1e-5
    right = session.run

    def wrong(feeds: dict[str, Any]) -> dict[str, Any]:
        found = right(feeds)
        return found | {"logits": 2 * found["logits"]} if feeds["input_ids"].shape[1] == longest else found

    assert model.preprocessing.text is not None
    longest = model.preprocessing.text.max_length
    assert longest > made.inputs["input_ids"].shape[1]
    session.run = wrong  # type: ignore[method-assign, assignment]
    assert golden_errors(session, made, model.preprocessing)["logits"] > 0.1
