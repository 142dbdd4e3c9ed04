"""Bundle → figures: latency of every variant with and without preprocessing, memory, energy, and the board's state.

All variants run in one process, one call of each in turn, warm (timing.py). End to end is what ``Predictor.predict``
does with the golden samples as files: decode, resize, tokenise, run, decide. Engine only is the graph on arrays.
Nothing is kept between calls; a split graph whose y is known is measured apart, as ``y_cached``: its main file alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.bench.board import Board, Reading, peak_memory, resident_memory
from mope_deploy.bench.energy import EnergyMeter
from mope_deploy.bench.timing import interleave, ratio_of_medians, summary, warm_up
from mope_deploy.bundle import Bundle
from mope_deploy.engines import Providers, engines_not_run, open_session
from mope_deploy.engines.golden import check_outputs_are_golden
from mope_deploy.engines.onnxruntime.cpu import usable_cores
from mope_deploy.engines.split import SplitSession
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.errors import ConfigError, EngineError, MopeError, UsageError
from mope_deploy.extras import installed_versions
from mope_deploy.predictor import Predictor
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track

__all__ = ["FORMAT", "SCHEMA", "measure"]

FORMAT, SCHEMA = "mope-bench", 1
_SLICE_S = 1.0  # of measuring, between two looks at the board
_LEAST_ROUNDS = 5
_WARM_UP_S = 1.0
_ENERGY_S = 3.0  # of each variant alone; sensors of a Jetson answer about ten times a second
_ENGINE, _CACHED, _WHOLE, _PREPARING = "engine", "y_cached", "end_to_end", "preprocessing"
_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class _Variant:
    """One graph in its engine, ready."""

    predictor: Predictor
    load_s: float
    loaded_bytes: int | None

    @property
    def name(self) -> str:
        return self.predictor.graph


def measure(
    path: str | Path,
    *,
    variants: Sequence[str] | None = (),
    engine: str = "auto",
    providers: Providers | None = None,
    threads: int | None = None,
    arena: bool | None = None,
    spinning: bool = False,
    batch: int = 1,
    text_length: int | None = None,
    seconds: float = 10.0,
    board: Board | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a bundle on this device.

    Args:
        path: the bundle's folder.
        variants: names of graphs; empty for the canonical one, None for all that run here.
        engine, providers, threads, arena, spinning: see :func:`mope_deploy.engines.open_session`.
        batch: samples of each call, golden ones, again and again if there are fewer.
        text_length: tokens of every text, whose words are repeated and cut to it; by default the golden texts as they
            are.
        seconds: of measuring, all variants together; reading energy comes on top where the board reports any.
        board: whose sensors; by default this machine's.
        on_step: called with a few words before each step.

    Returns:
        JSON-ready figures; docs/performance.md describes them.

    Raises:
        UsageError: an argument cannot be used, or there is no such graph or bundle.
        BundleError: the bundle is damaged.
        EngineError: no variant runs here, or one failed while it ran.
        ParityError: a variant does not compute the golden outputs, so its speed says nothing.
    """
    board = board or Board()
    bundle = Bundle.open(path)
    preprocessing = _preprocessing(bundle, text_length)
    given = _given(bundle, batch, text_length)
    on_step("loading")
    how: dict[str, Any] = {
        "engine": engine,
        "providers": providers,
        "threads": threads,
        "arena": arena,
        "spinning": spinning,
    }
    loaded, unusable = _load(bundle, variants, engine, partial(_open, bundle, preprocessing, cache_mb=0, **how))
    rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    prepare = partial(preprocessing.collate, rows)
    arrays = prepare()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for variant in loaded:
        calls[_ENGINE, variant.name] = partial(_run, variant, arrays)
        session = variant.predictor.session
        if isinstance(session, SplitSession):
            given_y = session.main_feeds({spec.name: arrays[spec.name] for spec in session.inputs})
            calls[_CACHED, variant.name] = partial(session.main.run, given_y, ("logits",))
        calls[_WHOLE, variant.name] = partial(variant.predictor.predict, **given, batch_size=batch)  # type: ignore[arg-type]
    calls[_PREPARING, ""] = prepare
    times, readings = _timed(calls, seconds, board)
    energy = _energy(loaded, arrays, batch, board, seconds, on_step)
    figures = []
    for variant in loaded:
        row = _described(bundle, variant)
        for kind in (_ENGINE, _CACHED, _WHOLE):
            if (mine := times.get((kind, variant.name))) is not None:
                base = times[_ENGINE if kind == _CACHED else kind, loaded[0].name]
                row[kind] = summary(mine, samples=batch) | {"ratio_to_first": ratio_of_medians(mine, base).to_dict()}
        figures.append(row | {"energy": energy.get(variant.name, {})})
    measured = [graph.name for graph in bundle.manifest.graphs] if variants is None else [v.name for v in loaded]
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "bundle": {"name": bundle.manifest.name, "sha256": bundle.sha256},
        "machine": board.describe()
        | {
            "device": dataclasses.asdict(this_device()),
            "cores": usable_cores(),
            "versions": installed_versions(("mope-deploy", "numpy", "pillow", "tokenizers", *_LIBRARIES)),
        },
        "settings": how
        | {
            "providers": [p if isinstance(p, str) else [p[0], dict(p[1])] for p in providers or ()],
            "batch": batch,
            "text_length": int(arrays["input_ids"].shape[1]) if "input_ids" in arrays else None,
            "seconds": seconds,
        },
        "variants": figures,
        "unusable": unusable,
        "engines_not_run": engines_not_run(bundle, [one.predictor.session for one in loaded], measured),
        "preprocessing": summary(times[_PREPARING, ""], samples=batch),
        "idle_w": energy.get("", {}),
        "memory": {"peak_bytes": peak_memory()},
        "board": _ranges(readings),
    }


def _preprocessing(bundle: Bundle, text_length: int | None) -> Preprocessing:
    """The bundle's, or the one that makes every longer text ``text_length`` tokens."""
    made, text = bundle.preprocessing, bundle.preprocessing.text
    if text_length is None:
        return made
    if text is None:
        raise UsageError("the length of texts", received=text_length, expected="a bundle that reads text")
    if not 1 <= text_length <= text.max_length:
        raise UsageError(
            "the length of texts",
            received=text_length,
            expected=f"1 to {text.max_length} tokens, the bundle's own limit",
        )
    shorter = dataclasses.replace(made, text=dataclasses.replace(text, max_length=text_length))
    try:
        shorter.check_tokenizer()
    except ConfigError as error:  # no room for anything but special tokens
        raise UsageError(f"the length of texts: {error}") from error
    return shorter


def _given(bundle: Bundle, batch: int, text_length: int | None) -> dict[str, list[Any]]:
    """What :meth:`Predictor.predict` takes, a list by modality: the golden samples, repeated or cut to a batch."""
    if batch < 1:
        raise UsageError("batch", received=batch, expected="at least 1")
    samples = list(itertools.islice(itertools.cycle(bundle.golden_samples()), batch))
    given = {name: [getattr(sample, name) for sample in samples] for name in bundle.manifest.modalities}
    if text_length is not None:  # a word has a token at least
        given["text"] = [text and " ".join([text] * text_length) for text in given["text"]]
    return given


def _load(
    bundle: Bundle, wanted: Sequence[str] | None, engine: str, open_one: Callable[[str], _Variant]
) -> tuple[list[_Variant], dict[str, str]]:
    """The variants in their engines, checked on the golden samples, and why others do not run here.

    Only where all were asked for may one be missing: a graph that is newer than this engine, or made for another one.
    """
    if wanted:
        return [open_one(name) for name in dict.fromkeys(wanted)], {}
    graphs = bundle.manifest.graphs
    if wanted is not None:
        return [open_one(graphs[0].name if engine == "auto" else bundle.graph(engine=engine).name)], {}
    loaded: list[_Variant] = []
    refused: dict[str, MopeError] = {}
    for graph in graphs:
        try:
            loaded.append(open_one(graph.name))
        except (EngineError, UsageError) as error:
            refused[graph.name] = error
    if not loaded:
        raise next(iter(refused.values()))
    return loaded, {name: str(error) for name, error in refused.items()}


def _open(bundle: Bundle, preprocessing: Preprocessing, name: str, **how: Any) -> _Variant:
    before, began = resident_memory(), time.perf_counter()
    session = open_session(bundle, graph=name, **how)
    load_s = time.perf_counter() - began
    bundle.check_unchanged()
    check_outputs_are_golden(bundle, session, graph=name, sizes=False)  # greater ones would be in the memory it took
    after = resident_memory()
    predictor = Predictor(bundle=bundle, session=session, preprocessing=preprocessing, graph=name)
    return _Variant(predictor, load_s, None if after is None or before is None else after - before)


def _run(variant: _Variant, arrays: Mapping[str, NDArray[Any]]) -> object:
    session = variant.predictor.session
    return session.run({spec.name: arrays[spec.name] for spec in session.inputs}, ("logits",))


def _timed(
    calls: Mapping[tuple[str, str], Callable[[], object]], seconds: float, board: Board
) -> tuple[dict[tuple[str, str], NDArray[np.float64]], list[Reading]]:
    """Milliseconds of every call, and the board's state before, in between and after."""
    warm_up(calls, seconds=min(_WARM_UP_S, seconds / 2))
    readings, parts = [board.read()], []
    slices = max(1, math.ceil(seconds / _SLICE_S))
    began = time.perf_counter()
    for _ in track(range(slices), what="measuring", total=slices):
        parts.append(interleave(calls, seconds=seconds / slices))
        readings.append(board.read())
        if time.perf_counter() - began >= seconds:  # a round may take longer than a slice
            break
    if (missing := _LEAST_ROUNDS - sum(len(part[next(iter(calls))]) for part in parts)) > 0:
        parts.append(interleave(calls, seconds=0.0, rounds=missing))
    return {key: np.concatenate([part[key] for part in parts]) for key in calls}, readings


def _energy(
    variants: Sequence[_Variant],
    arrays: Mapping[str, NDArray[Any]],
    batch: int,
    board: Board,
    seconds: float,
    on_step: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Name of a variant → source → joules per sample and watts, of the engine alone; under ``""`` the idle watts.

    Interleaved calls cannot be told apart by sensors this slow, so each variant runs alone for a while.
    """
    state = board.read()
    if not state.joules and not state.watts:
        return {}
    each = min(_ENERGY_S, max(seconds / 2, 0.1))
    on_step(f"energy: {each:g} s idle, then of each variant alone")
    with EnergyMeter(board) as idle:
        time.sleep(each)
    found: dict[str, dict[str, Any]] = {"": {name: joules / idle.seconds for name, joules in idle.joules.items()}}
    for variant in variants:
        done, began = 0, time.perf_counter()
        with EnergyMeter(board) as meter:
            while not done or time.perf_counter() - began < each:
                _run(variant, arrays)
                done += 1
        found[variant.name] = {
            name: {"joules_per_sample": joules / (done * batch), "watts": joules / meter.seconds}
            for name, joules in meter.joules.items()
        }
    return found


def _described(bundle: Bundle, variant: _Variant) -> dict[str, Any]:
    session = variant.predictor.session
    graph = bundle.graph(variant.name, engine=session.name)
    return {
        "graph": graph.name,
        "precision": graph.precision,
        "bytes": sum(bundle.manifest.files[name].bytes for name in graph.files),
        "engine_name": session.name,
        "device": session.device,
        "why": session.why,
        "settings": session.settings,
        "load_s": variant.load_s,
        "loaded_bytes": variant.loaded_bytes,
    }


def _ranges(readings: Sequence[Reading]) -> dict[str, Any]:
    """Least and greatest of what was read while measuring, and the first and last."""
    found: dict[str, Any] = {"celsius": {}, "megahertz": {}}
    for what, ranges in found.items():
        told = [getattr(reading, what) for reading in readings]
        for key in dict.fromkeys(itertools.chain(*told)):
            values = [one[key] for one in told if key in one]
            ranges[key] = {"first": values[0], "last": values[-1], "least": min(values), "greatest": max(values)}
    return found
