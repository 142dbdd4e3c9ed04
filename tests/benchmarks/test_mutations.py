"""Faults in finished graphs: what is planted, and that none of a sample of them gets past the gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from benchmarks import mutations
from benchmarks.mutants import mutants_of
from benchmarks.mutations import BROKEN, FAULT, ROUNDING, SAME, Bench, Found, summary
from export.options import Options
from export.pack.golden import pick_samples
from export.variants import Work
from tests.export.conftest import Export, bert, data, exports, use_graph, vit

__all__ = ["bert", "data", "exports", "use_graph", "vit"]  # fixtures

MUTANTS = 14
LOOSE = {"labels": 0.8, "routing": 0.8, "metric": 0.2}  # random weights decide by narrow margins


@pytest.fixture
def bench(exports: dict[str, Export], use_graph: Callable[[Export], None], data: Path, tmp_path: Path) -> Bench:
    use_graph(exports["top2"])
    model = exports["top2"].model
    work = Work(
        model=model,
        options=Options(
            samples=45,
            gate_samples=40,
            calibration_samples=16,
            precisions=mutations.ALL,
            fuse=True,
            thresholds=LOOSE,
        ),
        folder=tmp_path,
        samples=pick_samples(data, model, 45),
        data=data,
        calibration=data,
        on_step=lambda _: None,
        on_report=lambda _: None,
    )
    return Bench("whole", work, effect_samples=64)


def test_every_fault_of_a_sample_is_refused(bench: Bench) -> None:
    found = [bench.judge(*one) for one, _ in zip(bench.mutants(), range(MUTANTS), strict=False)]
    faults = [one for one in found if one.verdict == FAULT]
    assert [one.key for one in faults if not one.gate] == []
    assert len(faults) > MUTANTS / 2
    assert len([one for one in faults if one.verify]) > len(faults) / 2
    assert not [one for one in found if one.verdict in (SAME, BROKEN) and one.verify]
    assert len({one.fault for one in found}) > 4


GRAPH = """
<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x) => (float[n, k] y) {
    a = MatMul(x, m__weight)
    b = Add(a, m__bias)
    c = Softmax<axis=-1>(b)
    d = MatMul(c, layers__0__dynamic__table)
    e = Gather<axis=1>(d, where)
    y = Transpose<perm=[0, 1]>(e)
}
"""


@pytest.fixture
def small() -> onnx.ModelProto:
    model = parser.parse_model(GRAPH)
    random = np.random.default_rng(0)
    weights = {
        "m__weight": random.standard_normal((4, 3), np.float32),
        "m__bias": np.array([1, 2, 3], np.float16).astype(np.float32),
        "layers__0__dynamic__table": random.standard_normal((3, 4), np.float32),
        "where": np.array([0, 1], np.int64),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name.replace("__", ".")) for name, array in weights.items()
    )
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
        node.input[:] = [name.replace("__", ".") for name in node.input]
    return model


def test_what_is_planted(small: onnx.ModelProto) -> None:
    made = mutants_of(small, experts=3)
    faults = {(one.place, one.fault) for one in made}
    sizes = {"sign", "× 0.25", "× 1.01", "zero", "one element", "rows shuffled"}
    assert {fault for place, fault in faults if place == "m.weight"} == sizes
    assert {fault for place, fault in faults if place == "layers.0.dynamic.table"} == {*sizes, "one expert's sign"}
    assert ("where", "one more") in faults
    for place, fault in (("Add_b", "Add → Sub"), ("Softmax_c", "axis"), ("Transpose_y", "perm")):
        assert (place, fault) in faults
    for one in made:
        changed = onnx.ModelProto()
        changed.CopyFrom(small)
        one.plant(changed)
        places = [
            *(a.name for a, b in zip(small.graph.initializer, changed.graph.initializer, strict=True) if a != b),
            *(a.name for a, b in zip(small.graph.node, changed.graph.node, strict=True) if a != b),
        ]
        assert places == [one.place], one
    assert [one.name for one in mutants_of(small, experts=3)] == [one.name for one in made]


def found(number: int, verdict: str, **changes: object) -> Found:
    one = Found(
        key=f"k{number}",
        case="whole",
        graph="model-int8",
        precision="int8",
        role="w",
        fault="sign",
        place="w",
        verdict=verdict,
        gate="no",
        values="",
        verify="no",
        effect=0.2,
        own=0.01,
        labels=0.03,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def test_the_table_counts_faults_alone() -> None:
    refused = [found(i, FAULT, values="no") for i in range(3)]
    others = [found(i, verdict) for i, verdict in enumerate((SAME, ROUNDING, BROKEN), 3)]
    page = summary([*refused, *others, found(6, FAULT, verify="")])
    assert "| whole | model-int8 | 7 | 1 | 1 | 1 | 4 | 100.0% | 75.0% | 75.0% |" in page
    assert "| sign: `w` | whole, model-int8 | values, verify | 2.0e-01 (own 1.0e-02) | 3.0% |" in page
    assert page.count("sign: `w`") == 1


def test_what_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    lines = tmp_path / "mutations.jsonl"
    done = [found(i, FAULT) for i in range(2)]
    text = "".join(json.dumps(asdict(one)) + "\n" for one in done)
    lines.write_text(text + text[:50], encoding="utf-8")  # interrupted
    assert list(mutations._read(lines)) == done
