"""Repair finds what breaks a file, keeps that alone, and never ships what it has not judged."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from export.gate import LogitsError, PrecisionReport, ProbabilityError, Share, Thresholds
from export.gate.found import InterfaceCheck
from export.options import Options
from export.precision.repair import Lowered, lower_within_gate
from mope_deploy.errors import ExportError, ParityError, UsageError

LAYERS = tuple(f"main.encoder.blocks.{i}" for i in range(8))
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
FEED: dict[str, Any] = {"x": None}
BROKEN = InterfaceCheck("names of the outputs", "scores", "logits")


class Fake:
    """A lowering whose parts cost what they are said to cost, and the gate that finds out.

    Args:
        costs: error of the logits by product or layer; of a layer, whichever of its products is lowered.
        drift: the same for the routing.
        alone: what each seems to lose by itself, if that is something else.
        limit, drift_limit: the largest sum of costs that passes, of each kind.
    """

    precision, runtime_mark, runs_on, layers = "int8", "", "any", LAYERS
    unfit = ()

    def __init__(
        self,
        costs: Mapping[str, float],
        *,
        drift: Mapping[str, float] | None = None,
        alone: Mapping[str, float] | None = None,
        limit: float = 0.1,
        drift_limit: float = 0.1,
    ) -> None:
        self.costs, self.drift, self.alone = costs, drift, alone or costs
        self.limit, self.drift_limit = limit, drift_limit
        self.tried: list[tuple[str, ...]] = []
        self.ranked = 0

    def products(self, layer: str) -> tuple[str, ...]:
        return tuple(f"{layer}.{part}" for part in PARTS)

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        known = {name for layer in LAYERS for name in (layer, *self.products(layer))}
        assert set(keep) <= known
        assert len(set(keep)) == len(keep)
        path.write_text(json.dumps(sorted(keep)))
        return [path]

    write_runnable = write

    def cost(self, kept: Collection[str], costs: Mapping[str, float]) -> float:
        found = 0.0
        for layer in LAYERS:
            lowered = [name for name in self.products(layer) if name not in kept and layer not in kept]
            found += costs.get(layer, 0.0) if lowered else 0.0
            found += sum(costs.get(name, 0.0) for name in lowered)
        return found

    def own_errors(self, feeds: Any, *, on_step: Any) -> dict[str, float]:
        """Of every product; what a layer costs as a whole, its four share."""
        assert list(feeds) == [FEED]
        self.ranked += 1
        names = [(layer, name) for layer in LAYERS for name in self.products(layer)]
        return {name: self.alone.get(name, 0.0) + self.alone.get(layer, 0.0) / 2 for layer, name in names}

    def judge(self, file: Path) -> PrecisionReport:
        kept = tuple(json.loads(file.read_text()))
        self.tried.append(kept)
        cost = self.cost(kept, self.costs)
        drift = self.cost(kept, self.drift) if self.drift is not None else 0.0
        finite = math.isfinite(cost)
        experts = (Share(1000, 1000), Share(1000, 1000 if drift <= self.drift_limit else 900))
        return PrecisionReport(
            file=file.name,
            sha256=_sha256(file),
            precision=self.precision,
            reference="",
            runtime="",
            mark="",
            samples=1000,
            interface=(),
            finite=finite,
            logits=LogitsError(*[cost if finite else math.nan] * 3),
            probabilities=ProbabilityError(0, 0.0, 0.0),
            labels=Share(1000, 1000 if cost <= self.limit else 900),
            metric=None,
            routed=self.drift is not None,
            experts=experts if self.drift is not None else (),
            drift=(0.0, 2 * drift) if self.drift is not None else (),
            selections=(),
            label_flips=(),
            expert_flips=(),
            thresholds=Thresholds(labels=0.99, routing=0.99, metric=None),
        )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def repair(fake: Fake, folder: Path, **arguments: Any) -> Lowered:
    return lower_within_gate(fake, fake.judge, folder, "model.int8.onnx", feeds=lambda: [FEED], **arguments)


def every(share: float, but: Mapping[str, float]) -> dict[str, float]:
    """A small cost for every product, and the rest."""
    return {f"{layer}.{part}": share for layer in LAYERS for part in PARTS} | dict(but)


def test_nothing_is_kept_where_nothing_has_to_be(tmp_path: Path) -> None:
    fake = Fake(every(0.001, {}))
    done = repair(fake, tmp_path)
    assert done.kept == ()
    assert (fake.tried, fake.ranked) == ([()], 0)  # no layer is looked at
    assert [path.name for path in done.files] == ["model.int8.onnx"]
    assert json.loads(done.files[0].read_text()) == []
    assert done.explain() == ""


@pytest.mark.parametrize("bad", [LAYERS[0], LAYERS[3], LAYERS[7]])
@pytest.mark.parametrize("cost", [0.5, math.inf])
def test_one_bad_product_is_found_and_alone_kept(bad: str, cost: float, tmp_path: Path) -> None:
    fake = Fake(every(0.001, {f"{bad}.mlp.fc1": cost}))
    done = repair(fake, tmp_path)
    assert done.kept == (f"{bad}.mlp.fc1",)
    assert json.loads(done.files[0].read_text()) == [f"{bad}.mlp.fc1"]
    assert done.report.passed
    assert done.report.sha256 == _sha256(done.files[0])
    assert fake.tried == [(), (bad,), (f"{bad}.mlp.fc1",)]
    damage = "it gives NaN or infinities" if cost == math.inf else "its own output is off by 50 %"
    assert f"{bad}.mlp.fc1 (lowered alone {damage})" in done.explain()
    assert "90.00 % of the labels agree; 3 choices tried" in done.explain()
    history = done.to_dict()
    assert json.loads(json.dumps(history, allow_nan=False))["kept"] == [f"{bad}.mlp.fc1"]
    assert len(done.history) == 3
    assert fake.ranked == 1  # all layers and products in one pass
    assert set(history["own_errors"]) == {name for layer in LAYERS for name in (layer, *fake.products(layer))}


def test_a_layer_is_kept_whole_where_no_part_of_it_does(tmp_path: Path) -> None:
    fake = Fake(every(0.001, {LAYERS[2]: math.inf}))
    done = repair(fake, tmp_path)
    assert done.kept == (LAYERS[2],)
    products = [f"{LAYERS[2]}.{part}" for part in PARTS]
    assert fake.tried[2:] == [tuple(sorted(products[:count])) for count in (1, 2, 3)]


def test_two_bad_products_of_one_layer(tmp_path: Path) -> None:
    bad = {f"{LAYERS[4]}.mlp.fc2": 0.4, f"{LAYERS[4]}.attn.qkv": 0.3}
    done = repair(Fake(every(0.001, bad)), tmp_path)
    assert done.kept == (f"{LAYERS[4]}.attn.qkv", f"{LAYERS[4]}.mlp.fc2")  # in the graph's order


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("cost", [1.0, math.inf])
def test_the_fewest_layers_are_kept(count: int, cost: float, tmp_path: Path) -> None:
    """Whole layers that are bad alike; each of several would hide behind the others if it were kept alone."""
    bad = [LAYERS[i] for i in (6, 1, 4, 2, 7, 0, 5)[:count]]
    fake = Fake(every(0.001, dict.fromkeys(bad, cost)))
    done = repair(fake, tmp_path, attempts=100)
    assert set(done.kept) == set(bad)
    assert list(done.kept) == sorted(bad)


def test_how_many_choices_the_search_for_layers_takes(tmp_path: Path) -> None:
    for count in range(1, 8):
        fake = Fake(every(0.001, dict.fromkeys(LAYERS[:count], 1.0)))
        with pytest.MonkeyPatch.context() as patch:
            for later in ("products_instead", "without_the_needless"):
                patch.setattr(f"export.precision.repair._Search.{later}", lambda _, best: best)
            (tmp_path / str(count)).mkdir()
            assert set(repair(fake, tmp_path / str(count)).kept) == set(LAYERS[:count])
        assert len(fake.tried) <= 1 + 2 * math.ceil(math.log2(8)), count


def test_what_the_gate_failed_on_is_what_is_kept(tmp_path: Path) -> None:
    """The logits suffer from one layer alone, less than they may; the routing mostly from another, more than it may."""
    costs, drift = {f"{LAYERS[1]}.mlp.fc1": 0.08}, every(0.001, {f"{LAYERS[6]}.attn.proj": 0.2})
    fake = Fake(costs, drift=drift, alone={f"{LAYERS[1]}.mlp.fc1": 0.3, f"{LAYERS[6]}.attn.proj": 0.2})
    done = repair(fake, tmp_path)  # the worst by itself turns out to be needless
    assert done.kept == (f"{LAYERS[6]}.attn.proj",)
    assert len(fake.tried) <= 6
    assert "lowered alone its own output is off by 20 %" in done.explain()
    assert "100.00 % of the labels and 95.00 % of the top experts agree" in done.explain()


@pytest.mark.parametrize(
    ("logits", "drift", "limits"), [((2.0, 0.09), (0.02, 0.0), (0.1, 0.01)), ((0.2, 0.0), (0.9, 0.4), (0.1, 0.5))]
)
def test_both_are_looked_for_if_both_failed(
    logits: tuple[float, float], drift: tuple[float, float], limits: tuple[float, float], tmp_path: Path
) -> None:
    """Each is compared with what it could be: little of the one may be all that went wrong with it."""
    fake = Fake(
        {f"{LAYERS[1]}.mlp.fc1": logits[0], f"{LAYERS[3]}.mlp.fc1": logits[1]},
        drift={f"{LAYERS[6]}.attn.proj": drift[0], f"{LAYERS[3]}.attn.qkv": drift[1]},
        alone={f"{LAYERS[1]}.mlp.fc1": 0.4, f"{LAYERS[3]}.mlp.fc1": 0.1, f"{LAYERS[6]}.attn.proj": 0.3},
        limit=limits[0],
        drift_limit=limits[1],
    )
    done = repair(fake, tmp_path)
    assert fake.tried[2] == (LAYERS[1], LAYERS[6])
    assert done.kept == (f"{LAYERS[1]}.mlp.fc1", f"{LAYERS[6]}.attn.proj")


def test_a_part_that_only_looked_bad_is_not_kept(tmp_path: Path) -> None:
    """It loses most by itself, but the gate does not miss it."""
    costs = every(0.001, {LAYERS[2]: 0.5})
    fake = Fake(costs, alone=costs | {LAYERS[5]: 9.0})
    done = repair(fake, tmp_path)
    assert fake.tried[1:3] == [(LAYERS[5],), (LAYERS[2], LAYERS[5])]
    assert done.kept == (LAYERS[2],)


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_budget_that_is_not_enough(attempts: int, tmp_path: Path) -> None:
    fake = Fake(every(0.001, dict.fromkeys(LAYERS[:5], 1.0)))
    with pytest.raises(ParityError, match="900 of 1,000") as caught:
        repair(fake, tmp_path, attempts=attempts)
    assert len(fake.tried) == attempts
    assert not list(tmp_path.iterdir())
    if attempts == 1:
        assert fake.ranked == 0  # ranking what may not be tried would be a waste
    else:
        assert f"even with {attempts - 1} of 8 layers kept" in str(caught.value)
        assert f"{attempts} choices tried" in str(caught.value)
        assert LAYERS[0] in str(caught.value)


def test_a_budget_that_ends_while_refining_keeps_what_passed(tmp_path: Path) -> None:
    fake = Fake(every(0.001, {f"{LAYERS[3]}.mlp.fc1": 0.5}))
    done = repair(fake, tmp_path, attempts=2)
    assert done.kept == (LAYERS[3],)
    assert len(fake.tried) == 2
    assert done.report.passed


def test_everything_is_never_kept(tmp_path: Path) -> None:
    fake = Fake(dict.fromkeys(LAYERS, 1.0))
    with pytest.raises(ParityError, match="even with 7 of 8 layers kept"):
        repair(fake, tmp_path)
    assert all(len(kept) < 8 for kept in fake.tried)
    assert not list(tmp_path.iterdir())


def test_what_no_layer_can_mend_is_not_searched(tmp_path: Path) -> None:
    class Misnamed(Fake):
        def judge(self, file: Path) -> PrecisionReport:
            return dataclasses.replace(super().judge(file), interface=(BROKEN,), samples=0)

    fake = Misnamed({})
    with pytest.raises(ParityError, match="names of the outputs: received scores, expected logits"):
        repair(fake, tmp_path)
    assert len(fake.tried) == 1


class Slow(Fake):
    """Every choice takes a minute of a clock that the search reads."""

    now = 0.0

    def judge(self, file: Path) -> PrecisionReport:
        self.now += 60
        return super().judge(file)


def test_the_search_ends_in_time_and_says_before_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = every(0.001, dict.fromkeys([f"{layer}.mlp.fc1" for layer in LAYERS[:3]], 1.0))
    found: dict[float, Slow] = {}
    notices: list[str] = []
    for minutes in (2.0, 2.5, 100.0):
        found[minutes] = fake = Slow(bad)
        monkeypatch.setattr("export.precision.repair.time.monotonic", lambda fake=fake: fake.now)
        (tmp_path / str(minutes)).mkdir()
        if minutes == 2.0:
            with pytest.raises(ParityError, match=r"3 choices tried in 2 minutes.*--repair-minutes"):
                repair(fake, tmp_path / str(minutes), minutes=minutes, on_notice=notices.append)
            assert "at most 31 choices in 2 min (--repair-minutes 2); Ctrl-C keeps the best" in notices[0]
            continue
        done = repair(fake, tmp_path / str(minutes), minutes=minutes, on_notice=notices.append)
        assert done.report.passed
        assert len(done.kept) == (3 if minutes == 100 else 4)  # what passed is kept, refined or not
    assert "at most 31 choices in 31 min" in notices[2]
    assert [len(fake.tried) for fake in found.values()][:2] == [3, 4]


@pytest.mark.parametrize("after", [3, 5])
def test_what_was_found_is_kept_when_interrupted(after: int, tmp_path: Path) -> None:
    class Interrupted(Fake):
        def judge(self, file: Path) -> PrecisionReport:
            if len(self.tried) == after:
                raise KeyboardInterrupt
            return super().judge(file)

    fake = Interrupted(every(0.001, dict.fromkeys([f"{layer}.mlp.fc1" for layer in LAYERS[:3]], 1.0)))
    notices: list[str] = []
    if after == 3:  # nothing has passed yet
        with pytest.raises(KeyboardInterrupt):
            repair(fake, tmp_path, on_notice=notices.append)
        assert not list(tmp_path.iterdir())
        return
    done = repair(fake, tmp_path, on_notice=notices.append)
    assert done.report.passed
    assert set(LAYERS[:3]) <= set(done.kept)
    assert notices[-1].startswith("interrupted: model.int8.onnx keeps what was found")


def test_what_is_written_is_what_was_judged(tmp_path: Path) -> None:
    class Fickle(Fake):
        def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
            path.write_text(f"something else, keeping {len(keep)}")
            return [path]

    fake = Fickle({})
    with pytest.raises(ExportError, match="was written twice and differs"):
        repair(fake, tmp_path)
    assert not list(tmp_path.iterdir())
    fake.runtime_mark = "emulated"  # the judged file was another one by nature
    assert repair(fake, tmp_path).files[0].read_text().startswith("something else")


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        repair(Fake({}), tmp_path, attempts=0)
    with pytest.raises(UsageError, match="--repair-minutes"):
        Options(repair_minutes=0.0)
    with pytest.raises(UsageError, match="more than 0"):
        repair(Fake({}), tmp_path, minutes=0.0)


def test_the_same_again(tmp_path: Path) -> None:
    costs = every(0.01, {LAYERS[6]: 0.2, f"{LAYERS[1]}.mlp.fc1": 0.2})
    found = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        done = repair(Fake(costs, limit=0.31), tmp_path / str(i), attempts=30)
        found.append((done.kept, done.history))
    assert found[0] == found[1]


def test_against_trying_everything(tmp_path: Path) -> None:
    """Costs that add up: then the beginning of the ranking is the best choice of its size."""
    costs = dict(zip(LAYERS, (3, 1, 4, 1.5, 9, 2, 6, 5), strict=True))
    for limit in (30, 20, 15, 9, 5, 2, 1):
        fake = Fake(costs, limit=limit)
        (tmp_path / str(limit)).mkdir()
        done = repair(fake, tmp_path / str(limit), attempts=100)
        fewest = min(
            size
            for size in range(8)
            if any(Fake(costs).cost(kept, costs) <= limit for kept in itertools.combinations(LAYERS, size))
        )
        assert len(done.kept) == fewest
