"""``mutations``: single faults in the finished files of every precision, and who refuses each.

Three are asked. The gate: the one function that an export calls last, on files as they are packed. The gate by values
alone: what the model's own outputs say, as if the exporter had made the fault before anything was judged. ``mope
verify``: the golden samples. What one of them lets through is run on many real samples: where no output changes beyond
rounding, there is no fault.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.mutants import Mutant, mutants_of
from export.final import judge_final as judged_last
from export.gate import THRESHOLDS, judge_again, require_parity, require_precision
from export.gate.cases import sample_cases
from export.gate.device import open_files
from export.gate.reference import eager_outputs
from export.options import Options
from export.pack.contents import contents_of
from export.pack.golden import pick_samples
from export.parts import in_parts
from export.source import find_source
from export.variants import Variant, Work, make_variants
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines.golden import check_outputs_are_golden
from mope_deploy.engines.session import Arrays, Session
from mope_deploy.errors import EngineError, ExportError, MopeError, ParityError

__all__ = ["CASES", "Bench", "Found", "run_mutations", "summary"]

ALL = ("fp32", "fp16", "bf16", "int8", "int8-dynamic")
CASES: Mapping[str, Mapping[str, Any]] = {  # one bundle each: options of its export
    "whole": {"precisions": ALL, "fuse": True},
    "split": {"precisions": ("fp32", "fp16", "int8", "int8-dynamic"), "split": True},
    "no-routing": {"precisions": ALL, "routing": False},
}
EQUIVALENT = 1e-6  # of outputs that differ by less, one rounded otherwise

# What a mutant is.
FAULT, BROKEN, SAME, ROUNDING = "fault", "does not open or run", "equivalent", "within rounding"


@dataclass(frozen=True)
class Found:
    """One mutant.

    Attributes:
        key: case, graph and mutant, by which it is known again.
        case, graph, precision: where it was planted.
        role, fault, place: of :class:`.mutants.Mutant`.
        verdict: one of the words above.
        gate: what the gate said against it; empty if nothing.
        values: what the gate said by values alone.
        verify: what the golden samples said; None where they cannot be run (bf16).
        effect: where one of them said nothing, max|a − b| / max|b| of the logits against the file as it was.
        own: the same of that file against the eager model: what its precision costs.
        labels: share of samples with another label, against the file as it was.
    """

    key: str
    case: str
    graph: str
    precision: str
    role: str
    fault: str
    place: str
    verdict: str
    gate: str
    values: str
    verify: str | None
    effect: float | None = None
    own: float | None = None
    labels: float | None = None


def judged_by_values(work: Work, variant: Variant) -> None:
    """What the gate of its precision says of a graph's outputs; raises a :class:`MopeError` against them."""
    if variant.lowered is None:
        require_parity(work.parity.compare(variant.name, variant.files[0], work.final, variant.part_files))
        return
    file, *parts = _runnable(variant)
    asked = replace(THRESHOLDS[variant.precision], **work.options.thresholds)
    found = judge_again(work.evaluation, file, work.final, precision=variant.precision, thresholds=asked, parts=parts)
    require_precision(found)


class Bench:
    """One export, finished but for its bundle, whose graphs are mutated.

    Args:
        case: its name.
        work: what the export works on.
        effect_samples: real samples that outputs are compared on, where both gates let a mutant through.
        seed: of the choice of mutants.
    """

    def __init__(self, case: str, work: Work, *, effect_samples: int, seed: int = 0) -> None:
        self.case, self.work, self._seed, self._count = case, work, seed, effect_samples
        variants = make_variants(work)
        self.variants = in_parts(work, variants) if work.options.split else variants
        contents = contents_of(work, self.variants)
        folder = work.folder / "as-exported"
        self.bundle: Bundle = write_bundle(folder, files=contents.files, manifest=contents.manifest)
        self._before: dict[str, tuple[list[Arrays], float]] = {}

    @cached_property
    def _cases(self) -> list[tuple[dict[str, NDArray[Any]], Arrays]]:
        rows = pick_samples(self.work.data, self.work.model, self._count, seed=self._seed + 7)
        feeds = [case.inputs for case in sample_cases(self.work.model.preprocessing, rows)]
        return [(one, eager_outputs(self.work.model, one)) for one in feeds]

    def mutants(self) -> Iterator[tuple[Variant, Path, Mutant]]:
        """Each graph's mutants, one of each graph in turn, so that any beginning of them is a fair sample."""
        waiting = []
        for variant in self.variants:
            lists = [
                [(variant, file, mutant) for mutant in self._of_file(variant, file)]
                for file in (variant.files[0], *variant.part_files)
            ]
            waiting.append(list(_in_turn(lists)))
        yield from _in_turn(waiting)

    def _of_file(self, variant: Variant, file: Path) -> list[Mutant]:
        return mutants_of(onnx.load(file), experts=self.work.model.config.experts, seed=self._seed)

    def judge(self, variant: Variant, file: Path, mutant: Mutant) -> Found:
        """Plant it in a copy, and ask both gates."""
        folder = self.work.folder / "mutant"
        folder.mkdir(exist_ok=True)
        changed = folder / file.name
        model = onnx.load(file)
        mutant.plant(model)
        onnx.save(model, changed)
        planted = _with(variant, file, changed)
        found = Found(
            key=self.key(variant, file, mutant),
            case=self.case,
            graph=variant.name,
            precision=variant.precision,
            role=mutant.role,
            fault=mutant.fault,
            place=mutant.place,
            verdict=BROKEN,
            gate="",
            values="",
            verify="",
        )
        with contextlib.suppress(MopeError):
            self._open(planted).run(self._cases[0][0])
            said = [_said_by(lambda gate=gate: gate(self.work, planted)) for gate in (judged_last, judged_by_values)]
            found = replace(found, gate=said[0], values=said[1], verify=self._verified(planted))
            found = replace(found, **self._verdict(planted, found))
        for path in folder.iterdir():
            path.unlink()
        return found

    def key(self, variant: Variant, file: Path, mutant: Mutant) -> str:
        """By which a mutant is known again."""
        return f"{self.case} | {variant.name} | {file.name} | {mutant.name}"

    def _verified(self, variant: Variant) -> str | None:
        """What ``mope verify`` says of these files."""
        graph = next(one for one in self.bundle.manifest.graphs if one.name == variant.name)
        if not graph.takes("onnxruntime"):
            return None
        return _said_by(lambda: check_outputs_are_golden(self.bundle, self._open(variant), graph=graph.name))

    def _open(self, variant: Variant) -> Session:
        """As a device opens them, as far as ONNX Runtime can."""
        file, *parts = _runnable(variant)
        return open_files(file, self.work.final, parts, precision=variant.precision, cpu=self.work.cpu)

    def _verdict(self, planted: Variant, found: Found) -> dict[str, Any]:
        if found.gate and found.values and found.verify != "":
            return {"verdict": FAULT}
        session = self._open(planted)
        after = [session.run(feeds) for feeds, _ in self._cases]
        before, own = self._unmutated(found.graph)
        effect, routing = _difference(after, before, "logits"), _difference(after, before, "routing")
        task = self.work.model.task
        flips = [
            (task.cells(task.decide(a["logits"])) != task.cells(task.decide(b["logits"]))).any(axis=-1)
            for a, b in zip(after, before, strict=True)
        ]
        measured = {"effect": effect, "own": own, "labels": float(np.concatenate(flips).mean())}
        if found.values or effect > own:
            return {"verdict": FAULT} | measured
        return {"verdict": ROUNDING if max(effect, routing) > EQUIVALENT else SAME} | measured

    def _unmutated(self, graph: str) -> tuple[list[Arrays], float]:
        """Outputs of a graph as it was, and their distance from the eager model's."""
        if graph not in self._before:
            variant = next(one for one in self.variants if one.name == graph)
            session = self._open(variant)
            outputs = [session.run(feeds) for feeds, _ in self._cases]
            self._before[graph] = outputs, _difference(outputs, [eager for _, eager in self._cases], "logits")
        return self._before[graph]


def run_mutations(
    source: str | Path, folder: Path, *, quick: bool, minutes: float, cases: Sequence[str] = tuple(CASES)
) -> list[Found]:
    """Judge mutants of a trained run until all were, or time is up; what ``folder`` holds already is not done again.

    Args:
        source: a run folder, or a checkpoint that brings data.
        folder: for ``mutations.jsonl``, one line for each mutant, and the exports' files meanwhile.
        quick: few samples, and every tenth mutant.
        minutes: of judging, over all cases.
        cases: of :data:`CASES`.
    """
    found = find_source(source)
    model, lines = found.load(), folder / "mutations.jsonl"
    done = {one.key: one for one in _read(lines)}
    options = Options(
        name="mutations", calibration_samples=64, samples=64 if quick else 113, gate_samples=128 if quick else 256
    )
    for case in cases:
        work = Work(
            model=model,
            options=replace(options, **CASES[case]),
            folder=folder / case,
            samples=pick_samples(found.data, model, options.samples or 0),
            data=found.data,
            calibration=found.calibration,
            on_step=lambda _: None,
            on_report=lambda _: None,
        )
        shutil.rmtree(work.folder, ignore_errors=True)  # of an interrupted run: the same model gives the same files
        work.folder.mkdir(parents=True)
        bench = Bench(case, work, effect_samples=128 if quick else 512)
        ends = time.monotonic() + 60 * (minutes / len(cases))
        for count, (variant, file, mutant) in enumerate(bench.mutants()):
            if time.monotonic() > ends:
                break
            key = bench.key(variant, file, mutant)
            if key in done or (quick and count // len(bench.variants) % 10):
                continue
            done[key] = bench.judge(variant, file, mutant)
            with lines.open("a", encoding="utf-8") as file_:
                file_.write(json.dumps(asdict(done[key]), ensure_ascii=False) + "\n")
    return list(done.values())


def summary(found: Sequence[Found]) -> str:
    """Two tables in Markdown: the shares of faults that are refused, and the faults that a gate lets through."""
    lines = [
        "| bundle | graph | mutants | not opened | equivalent | within rounding | faults | gate | by values | verify |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, graph in {(one.case, one.graph): None for one in found}:
        lines.append(_row(case, graph, [one for one in found if (one.case, one.graph) == (case, graph)]))
    lines += [_row("all", "", found), "", "| let through | bundle, graph | by | logits off by | labels |"]
    lines.append("|---|---|---|---|---|")
    left = [one for one in found if one.verdict == FAULT and not (one.gate and one.values)]
    for one in sorted(left, key=lambda one: -(one.effect or 0)):
        by = [name for name in ("gate", "values", "verify") if getattr(one, name) == ""]
        lines.append(
            f"| {one.fault}: `{one.place}` | {one.case}, {one.graph} | {', '.join(by)} | "
            f"{one.effect:.1e} (own {one.own:.1e}) | {one.labels:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _row(case: str, graph: str, found: Sequence[Found]) -> str:
    verdicts = Counter(one.verdict for one in found)
    faults = [one for one in found if one.verdict == FAULT]
    runnable = [one for one in faults if one.verify is not None]
    shares = [_share([one for one in faults if getattr(one, name)], faults) for name in ("gate", "values")]
    shares.append(_share([one for one in runnable if one.verify], runnable))
    counts = [len(found), *(verdicts[word] for word in (BROKEN, SAME, ROUNDING, FAULT))]
    return "| " + " | ".join([case, graph, *(f"{count:,}" for count in counts), *shares]) + " |"


def _share(part: Sequence[Found], whole: Sequence[Found]) -> str:
    return f"{len(part) / len(whole):.1%}" if whole else "–"


def _read(lines: Path) -> Iterator[Found]:
    """What was done before; a line that an interruption cut short is done again."""
    if lines.exists():
        for line in lines.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                yield Found(**json.loads(line))


def _with(variant: Variant, file: Path, changed: Path) -> Variant:
    """The variant with one of its files in the place of another."""
    if file == variant.files[0]:
        return replace(variant, files=(changed,), runnable=changed)  # its weights are in the file
    parts = tuple(
        replace(part, files=(changed, *part.files[1:])) if part.files[0] == file else part for part in variant.parts
    )
    return replace(variant, parts=parts)


def _said_by(check: Any) -> str:
    """What a check says against something, in one line; empty if nothing."""
    try:
        check()
    except (ParityError, EngineError, ExportError, MopeError) as error:
        return str(error)[:300]
    return ""


def _difference(a: Sequence[Arrays], b: Sequence[Arrays], name: str) -> float:
    """max|a − b| / max|b| over all batches; 0 where there is no such output."""
    pairs = [(one[name].astype(np.float64), other[name]) for one, other in zip(a, b, strict=True) if name in one]
    if not pairs:
        return 0.0
    largest = max(float(np.abs(other).max()) for _, other in pairs)
    error = float(np.max([np.abs(one - other).max() for one, other in pairs]))  # NaN if one is
    return error / largest if np.isfinite(error) else float("inf")


def _in_turn(lists: Sequence[Sequence[Any]]) -> Iterator[Any]:
    for i in range(max(map(len, lists), default=0)):
        yield from (one[i] for one in lists if i < len(one))


def _runnable(variant: Variant) -> list[Path]:
    """Its files, the main one first; of bf16, which ONNX Runtime cannot run, their values in float32."""
    files = [variant.files[0], *variant.part_files]
    if variant.precision != "bf16":
        return files
    return [_widened(file, file.with_suffix(".wide.onnx")) for file in files]


def _widened(file: Path, path: Path) -> Path:
    """A bf16 file with all its values, computing in float32."""
    model = onnx.load(file)
    half, whole = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in [one for one in model.graph.initializer if one.data_type == half]:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == half:
                attribute.i = whole
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path
