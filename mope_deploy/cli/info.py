"""``mope info``: what a bundle is, and what could run it here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mope_deploy.cli.options import AsJson, BundleFolder
from mope_deploy.cli.printing import print_rows, print_utf8
from mope_deploy.errors import EngineError, MopeError

if TYPE_CHECKING:
    from mope_deploy.bundle import Bundle
    from mope_deploy.manifest import Gate, Manifest

__all__ = ["info"]


def info(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Say what a bundle is: task, inputs, graphs, parity figures, versions. Its files are checked first."""
    from mope_deploy.bundle import MANIFEST, Bundle
    from mope_deploy.engines.onnxruntime.cpu import cpu_settings

    opened = Bundle.open(bundle)
    if as_json:
        print_utf8((opened.path / MANIFEST).read_text(encoding="utf-8"))
        return
    cpu = cpu_settings(opened.manifest.build.cpu)
    print_rows(
        [
            *_described(opened.manifest),
            ("sessions on a CPU", f"{cpu} (threads: {cpu.threads_from})"),  # unless options say otherwise
            ("sha256", opened.sha256),
            *_engines(opened),
        ]
    )


def _engines(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """What could run it here, and what was built for it."""
    from mope_deploy.engines.listing import built_engines
    from mope_deploy.engines.onnxruntime.providers import overwritten, provider_states
    from mope_deploy.engines.onnxruntime.session import available_providers, library_version
    from mope_deploy.engines.tensorrt.backends import BACKENDS, installed
    from mope_deploy.engines.tensorrt.device import this_device
    from mope_deploy.engines.tensorrt.sidecar import Sidecar

    try:
        yield "onnxruntime here", "; ".join(filter(None, (library_version(), overwritten())))
        for name, state, options in provider_states(available_providers(), this_device()):
            yield f"provider {name}", state
            yield from (("", f"{key}={value}") for key, value in options.items())
    except MopeError as error:
        yield "onnxruntime here", str(error)
    found = installed()
    for name in BACKENDS:
        library = found.get(name, "not installed")
        yield f"{name} here", library if isinstance(library, str) else library.version
    for graph in bundle.manifest.graphs:
        for name, files in built_engines(bundle, graph.name):
            key = f"{'exported engine' if files.exported else 'engine'} {files.engine.name}"
            try:
                sidecar = Sidecar.read(files.sidecar)
                sizes = ", ".join(f"{axis} {size}" for axis, size in sidecar.profile.items())
                targets = ", ".join(sidecar.compute_capabilities)
                yield key, f"{name} {sidecar.version}, for {targets}; {sizes}"
            except EngineError as error:
                yield key, str(error)


def _judged(gate: Gate) -> str:
    """How a graph of lower precision compared with the eager model."""
    figures, asked = gate.figures, gate.thresholds
    parts = []
    for key, threshold, words in (
        ("labels_agreement", "labels", "of labels"),
        ("experts_worst_layer_agreement", "routing", "of top experts in the worst layer"),
    ):
        share, least = figures.get(key), asked.get(threshold)
        if isinstance(share, float | int):
            shown = math.floor(round(share * 1e4, 6)) / 100  # as the exporter's tables round: 100 means all
            parts.append(f"{shown:.2f} % {words} equal" + (f" (≥ {least:.1%})" if least is not None else ""))
    before, after = figures.get("metric_before"), figures.get("metric_after")
    if isinstance(before, float | int) and isinstance(after, float | int):
        parts.append(f"{figures.get('metric', 'metric')} {before:.4f} → {after:.4f}")
    mark = f", {gate.mark}" if gate.mark else ""
    return "; ".join([*parts, f"{gate.samples:,} samples{mark}"])


def _described(manifest: Manifest) -> Iterator[tuple[str, str]]:
    task, labels = manifest.task, manifest.task.labels
    few = ", ".join(labels[:10]) + (f" … {len(labels) - 10:,} more" if len(labels) > 10 else "")
    yield "name", manifest.name
    yield "created", manifest.created
    yield "schema", str(manifest.schema)
    yield "task", task.type + (f", threshold {task.threshold:g}" if task.threshold is not None else "")
    yield f"{len(labels):,} labels", few
    yield "main", manifest.main
    yield "complementary", ", ".join(manifest.complementary) or "none"
    if manifest.image is not None:
        yield "image", f"{manifest.image.height} x {manifest.image.width} pixels, {manifest.image.interpolation}"
    if manifest.text is not None:
        yield "text", f"at most {manifest.text.max_length:,} tokens"
    if manifest.audio is not None:
        clip, most = manifest.audio, "" if manifest.audio.fixed else "at most "
        yield "audio", f"{most}{clip.max_seconds:g} s at {clip.sample_rate:,} Hz, {clip.form}"
    if manifest.video is not None:
        pixels = f"{manifest.video.image.height} x {manifest.video.image.width} pixels"
        yield "video", f"{manifest.video.frames} frames of {pixels}, of the first {manifest.video.max_seconds:g} s"
    if manifest.missing:
        yield "may be missing", ", ".join(manifest.missing)
    if manifest.routing is not None:
        kind = "dense" if manifest.routing.top_k is None else f"top-{manifest.routing.top_k}"
        yield "routing", f"{kind}, {manifest.routing.experts} experts in each of {manifest.routing.layers} layers"
    for graph in manifest.graphs:
        size = sum(manifest.files[name].bytes for name in graph.files) / 1e6
        runs = "" if graph.runs_on == "any" else f", for {graph.runs_on} only"
        yield f"graph {graph.name}", f"{graph.file}, {graph.precision}, opset {graph.opset}, {size:,.1f} MB{runs}"
        for part in graph.parts:
            size = sum(manifest.files[name].bytes for name in (part.file, *part.data)) / 1e6
            width = part.outputs[1].shape[1]
            yield "", f"of it {part.modality}: {part.file}, {size:,.1f} MB; {width:,} numbers for each input"
        if graph.gate is not None:
            yield "", _judged(graph.gate)
            if graph.gate.kept:
                yield "", f"kept in fp32: {', '.join(graph.gate.kept)}"
    if manifest.build.target is not None:
        yield "target", manifest.build.target
    if manifest.build.profile:
        sizes = (f"{axis} {':'.join(map(str, size))}" for axis, size in manifest.build.profile.items())
        yield "engines are built for", ", ".join(sizes)
    for key, figure in manifest.parity.figures.items():
        yield f"parity {key}", f"{figure:.3g}" if isinstance(figure, float) else str(figure)
    yield from manifest.versions.items()
