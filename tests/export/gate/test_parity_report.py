"""The verdict of the parity gate on what was measured: values, decisions, near-ties."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from export.gate import require_parity
from export.gate.cases import Case, generated_cases
from export.gate.device import Run as _Run
from export.gate.found import InterfaceCheck
from export.gate.parity import _experts, _labels, measure
from export.gate.parity_report import NearTie, Rounding, ValueCheck
from mope_deploy.errors import ParityError
from mope_deploy.model import MoPE
from tests.export.conftest import Export


def value_check(error: float, rounding: Rounding | None = None, *, values: int = 128) -> ValueCheck:
    return ValueCheck("logits", "generated", values, 128, error, 1.0, 1e-5, "x", rounding)


def test_the_verdict_on_values() -> None:
    alike, unlike = Rounding(1e-5, 1e-5, typical=1.1, worst=3.0), Rounding(1e-6, 2e-5, typical=2.1, worst=3.0)
    one_row = Rounding(1e-6, 2e-5, typical=1.1, worst=11.0)
    assert value_check(1e-5).passed
    assert not value_check(1.01e-5).passed
    assert not value_check(1e-6, values=127).passed
    assert value_check(5e-5, alike).passed
    assert not value_check(5e-5, unlike).passed
    assert not value_check(5e-5, one_row).passed
    assert not value_check(1.01e-4, alike).passed
    assert not value_check(float("nan"), alike).passed
    assert not value_check(float("inf"), alike).passed


def test_the_verdict_on_everything(exports: dict[str, Export]) -> None:
    """One failed part of any kind fails the whole."""
    export = exports["dense"]
    good = measure(export.model, export.file, export.config, generated_cases(export.config.graph))
    assert good.passed
    wrong_axis = InterfaceCheck("axes", "(2, 3)", "(batch, 3)")
    wrong_labels = dataclasses.replace(
        good.decisions[0], different=1, faults=(NearTie("x", 0, "label", "a", "b", 1.0, 1e-5),)
    )
    for bad in (
        dataclasses.replace(good, interface=(*good.interface, wrong_axis)),
        dataclasses.replace(good, values=(*good.values, value_check(1e-3))),
        dataclasses.replace(good, values=tuple(check for check in good.values if check.output != "logits")),
        dataclasses.replace(good, decisions=(wrong_labels, *good.decisions[1:])),
        dataclasses.replace(good, decisions=()),
        dataclasses.replace(good, values=()),
    ):
        assert not bad.passed
        assert bad.problems()
        assert bad.to_dict()["passed"] is False
        with pytest.raises(ParityError):
            require_parity(bad)


def one_run(eager: list[float], exported: list[float]) -> _Run:
    case = Case("x", "generated", {"pixel_values": np.zeros((1, 1), np.float32)})
    a, b = (np.array([values], np.float32) for values in (eager, exported))
    return _Run(case, {"logits": a}, {"logits": b})


def routed(scores: list[list[float]], mixture: list[list[float]]) -> _Run:
    """One row: the model's scores in every layer, and the weights that the file gave."""
    case = Case("x", "generated", {"pixel_values": np.zeros((1, 1), np.float32)})
    given = np.array([mixture], np.float32)
    return _Run(case, {"scores": np.array([scores], np.float32)}, {"mixture": given, "selected": given > 0})


def test_a_flipped_label_within_the_error_is_a_near_tie_and_listed(exports: dict[str, Export]) -> None:
    model: MoPE = exports["dense"].model
    run = one_run([1.0, 1.0 - 1e-6, 0.0], [1.0 - 1e-6, 1.0, 0.0])
    near = _labels([run], model, limit=1e-5)
    assert (near.compared, near.equal, near.near_ties, near.different) == (1, 0, 1, 0)
    assert near.passed
    tie = near.listed[0]
    assert (tie.eager, tie.exported, tie.where, tie.row) == ("entailment", "neutral", "label", 0)
    far = _labels([run], model, limit=1e-7)
    assert (far.near_ties, far.different, far.passed) == (0, 1, False)


def test_a_near_tie_that_did_not_flip_is_counted_as_well(exports: dict[str, Export]) -> None:
    run = one_run([1.0, 1.0 - 1e-6, 0.0], [1.0, 1.0 - 1e-6, 0.0])
    found = _labels([run], exports["dense"].model, limit=1e-5)
    assert (found.equal, found.near_ties, len(found.listed)) == (1, 1, 1)


def test_a_multi_label_decision_is_about_zero(exports: dict[str, Export]) -> None:
    run = one_run([1e-7, 1.0, -1.0, 1e-2], [-1e-7, 1.0, -1.0, -1e-2])
    found = _labels([run], exports["unrouted"].model, limit=1e-6)
    assert (found.compared, found.equal, found.near_ties, found.different) == (4, 2, 1, 1)
    assert found.faults[0].where == "label d"


def test_experts_flip_only_in_near_ties() -> None:
    run = routed([[1.0, 1.0 - 1e-6, -5.0]], [[0.4, 0.5, 0.1]])
    assert _experts([run], limit=1e-5).passed
    wrong = _experts([run], limit=1e-7)
    assert not wrong.passed
    assert (wrong.faults[0].eager, wrong.faults[0].exported) == ("expert 0", "expert 1")


def test_a_selection_is_judged_by_the_gap_at_its_edge() -> None:
    run = routed([[5.0, 2.5001, 2.4999]], [[0.9, 0.0, 0.1]])
    assert _experts([run], limit=1e-3).near_ties == 1
    assert _experts([run], limit=1e-3).passed
    wrong = _experts([run], limit=1e-4)
    assert not wrong.passed
    assert (wrong.faults[0].eager, wrong.faults[0].exported) == ("expert 0 with 1", "expert 0 with 2")


def test_a_tie_in_one_layer_excuses_nothing_in_the_next() -> None:
    run = routed([[1.0, 1.0], [3.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    found = _experts([run], limit=1e-3)
    assert (found.compared, found.near_ties, found.different) == (2, 1, 1)
    assert found.faults[0].where == "layer 1"


def test_a_weight_of_nothing_is_no_choice() -> None:
    """The second and the third score vanish in the softmax: which of the two was selected is up to each library."""
    run = routed([[0.0, -120.0, -200.0]], [[1.0, 0.0, 0.0]])
    run.exported["selected"] = np.array([[[True, False, True]]])
    found = _experts([run], limit=1e-3)
    assert (found.compared, found.equal, found.different) == (1, 1, 0)


def test_one_expert_is_no_choice() -> None:
    found = _experts([routed([[0.3]], [[1.0]])], limit=1e-3)
    assert (found.compared, found.equal, found.near_ties) == (1, 1, 0)


def test_what_was_compared_directly_is_part_of_the_verdict_and_of_what_is_said(exports: dict[str, Export]) -> None:
    export = exports["top1"]
    good = measure(export.model, export.file, export.config, generated_cases(export.config.graph))
    assert good.passed
    assert good.experts == 10
    document = good.to_dict()
    assert document["coverage"] == {"experts": 10, "selected": good.selected, "compared": 10}
    assert good.figures()["tables_compared"] == 10
    bad = dataclasses.replace(good, tables=(dataclasses.replace(good.tables[0], error=float("nan")), *good.tables[1:]))
    assert not bad.passed
    assert "the experts of layer 0 differ by nan" in bad.problems()[0]
