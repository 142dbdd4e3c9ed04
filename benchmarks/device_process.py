"""From nothing to the first prediction: a new Python process that imports mope_deploy, loads a bundle and predicts."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from benchmarks.child import run_child
from benchmarks.graphs import Workshop
from benchmarks.result import Result, Table
from mope_deploy.bundle import Bundle
from mope_deploy.console import err

__all__ = ["device_process"]

# time.monotonic counts from one moment for all processes of a Linux machine.
_CODE = """
import time
started = time.monotonic()
import json, sys
from mope_deploy import load
imported = time.monotonic()
predictor = load(sys.argv[1])
loaded = time.monotonic()
found = predictor.predict(**json.loads(sys.argv[2]))
predicted = time.monotonic()
from mope_deploy.bench.board import peak_memory
heavy = sorted({"torch", "transformers", "timm"} & set(sys.modules))
print(json.dumps({"started": started, "imported": imported, "loaded": loaded, "predicted": predicted,
                  "peak": peak_memory(), "heavy": heavy}))
"""
_STAGES = ("start Python", "import", "load", "first prediction", "all")


def device_process(workshop: Workshop) -> Result:
    """Medians of several processes, new each, the files in the system's cache; memory at its peak."""
    settings = workshop.settings
    path = settings.bundle or _make_bundle(settings.folder)
    bundle = Bundle.open(path)
    graph = bundle.manifest.graphs[0]
    size = sum(bundle.manifest.files[name].bytes for name in (graph.file, *graph.data))
    given = _golden_sample(bundle)
    err.print(f"measuring {settings.processes} processes", markup=False)
    stages: dict[str, list[float]] = {name: [] for name in _STAGES}
    peaks = []
    for number in range(settings.processes + 1):
        before = time.monotonic()
        found = run_child(_CODE, path, given, threads=settings.threads)
        assert not found["heavy"], f"the device side imported {found['heavy']}"
        if number == 0:  # writes Python's caches and reads all files once
            continue
        moments = [before, *(found[key] for key in ("started", "imported", "loaded", "predicted"))]
        for name, start, end in zip(_STAGES, moments, moments[1:], strict=False):
            stages[name].append(end - start)
        stages["all"].append(moments[-1] - before)
        peaks.append(found["peak"])
    rows = tuple((name, f"{statistics.median(v):.3f}", f"{min(v):.3f}", f"{max(v):.3f}") for name, v in stages.items())
    beyond = [(peak - size) / 1e6 for peak in peaks]
    return Result(
        about=f"A new process: start Python, import mope_deploy, load a bundle ({bundle.manifest.name}, "
        f"{graph.precision}, {size / 1e6:.1f} MB) in ONNX Runtime, predict one golden sample. Medians of "
        f"{settings.processes} processes; the files are in the system's cache. Peak memory: "
        f"{statistics.median(peaks) / 1e6:,.0f} MB.",
        tables=(Table("device process", ("stage", "median s", "least s", "greatest s"), rows),),
        values={
            target: {"value": statistics.median(values), "error": _error(values)}
            for target, values in (("process-time", stages["all"]), ("process-memory", beyond))
        },
    )


def _error(values: list[float]) -> float | None:
    """Standard error of a median, about that of a mean."""
    return 1.25 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _golden_sample(bundle: Bundle) -> str:
    """The first one as JSON of :meth:`Predictor.predict`'s arguments."""
    sample = next(iter(bundle.golden_samples()))
    modalities = (bundle.manifest.main, *bundle.manifest.complementary)
    return json.dumps({name: str(value) for name in modalities if (value := getattr(sample, name)) is not None})


def _make_bundle(folder: Path) -> Path:
    """The recipe digits-ve's model with freshly initialised prompts: training changes no size and no speed."""
    path = folder / "digits-ve"
    if path.is_dir():
        return path
    from export.pipeline import export_bundle
    from mope_deploy.model import MoPEConfig, build_model
    from train.embedded.digits_ve import ensure_digits_ve
    from train.recipe import load_recipe

    err.print("exporting the bundle of digits-ve", markup=False)
    config = MoPEConfig.from_dict(load_recipe("digits-ve").model.model_dump())
    data = ensure_digits_ve(folder / "digits-ve-data", train_pairs=3, validation_pairs=3, test_pairs=150)
    return export_bundle(build_model(config), path, data=data / "test.jsonl", name="digits-ve")
