"""``mope verify``: is a bundle what was exported, and does this device compute it?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mope_deploy.cli.options import AsJson, BundleFolder, EngineOptions, takes_engine_options
from mope_deploy.cli.printing import print_json, say, tell
from mope_deploy.errors import EngineError

if TYPE_CHECKING:
    from mope_deploy.bundle import Bundle

__all__ = ["verify"]


@takes_engine_options(but=["cache_mb"])
def verify(bundle: BundleFolder, options: EngineOptions, as_json: AsJson = False) -> None:
    """Check every file's hash, then repeat the golden samples: preprocessing bit for bit, outputs within tolerance."""
    from mope_deploy.bundle import Bundle
    from mope_deploy.engines import built_engines, engines_not_run
    from mope_deploy.engines.golden import check_inputs_are_golden

    opened = Bundle.open(bundle, verify=True)
    names, canonical = _graphs(opened, options)
    results, unusable = [], {}
    for name in names:
        first = name == canonical
        how = dataclasses.replace(options, graph=name, rebuild=options.rebuild and name == names[0], cache_mb=0)
        if not _in_onnxruntime(opened, name):
            how = dataclasses.replace(how, engine="tensorrt")
        try:
            predictor = how.load(bundle, verify=False, announce=first and bool(built_engines(opened, name)))
            results.append((predictor, predictor.verify()))
        except EngineError as error:
            # A variant may need a newer engine than this device has. One that runs and is wrong raises ParityError.
            if first:
                raise
            unusable[name] = str(error)
    if not results:
        check_inputs_are_golden(opened, opened.preprocessing)
        raise EngineError(
            f"{bundle}: its {len(opened.manifest.files)} files and its preprocessing are as exported, but none of its "
            f"graphs could be run",
            received="; ".join(f"{name}: {why}" for name, why in unusable.items()),
            todo="verify it where TensorRT and a GPU are: mope build BUNDLE, then mope verify BUNDLE",
        )
    opened.check_unchanged()  # each predictor has opened it again
    not_run = engines_not_run(opened, [predictor.session for predictor, _ in results], names)
    if as_json:
        found = {"bundle": str(bundle), "sha256": opened.sha256, "unusable": unusable, "engines_not_run": not_run}
        print_json(found | {"graphs": [vars(result) for _, result in results]})
        return
    say(f"{len(opened.manifest.files)} files: SHA-256 as in the manifest")
    for predictor, result in results:
        routing = "" if result.routing_error is None else f", routing error {result.routing_error:.1e}"
        ties = f", {result.near_ties} near-tied labels flipped" if result.near_ties else ""
        say(
            f"{result.graph} in {predictor.session.name} ({predictor.session.device}): {result.samples} golden "
            f"samples in {result.batches} batches, inputs equal to the last bit, "
            f"logits error {result.logits_error:.1e}{routing}{ties}"
        )
    for name, reason in unusable.items():
        tell(f"note: {name} cannot be used here, and is not unless asked for: {reason}")
    for file, reason in not_run.items():
        tell(f"note: {file} was not run: {reason}")
    if unlisted := opened.unlisted():
        tell(f"note: {len(unlisted)} files are not part of the bundle: {', '.join(unlisted[:10])}")
    say(f"{bundle} is as it was exported")


def _graphs(bundle: Bundle, options: EngineOptions) -> tuple[list[str], str | None]:
    """Which graphs to run, and the one that has to run whatever becomes of the others.

    None has to where TensorRT alone takes what there is: then that is said, with what could be checked all the same.
    """
    engine = options.engine
    if engine == "auto" and (options.threads is not None or options.arena is not None or options.providers):
        engine = "onnxruntime"
    wanted = [graph for graph in bundle.manifest.graphs if options.graph in (None, graph.name)]
    if engine != "auto" or not wanted:
        runs_here = "tensorrt" if engine == "tensorrt" else "onnxruntime"
        canonical: str | None = bundle.graph(options.graph, engine=runs_here).name  # or why there is none
        wanted = [graph for graph in wanted if graph.takes(runs_here)]
    else:
        canonical = next((graph.name for graph in wanted if graph.takes("onnxruntime")), None)
    return sorted((graph.name for graph in wanted), key=lambda name: name != canonical), canonical


def _in_onnxruntime(bundle: Bundle, name: str) -> bool:
    return any(graph.takes("onnxruntime") for graph in bundle.manifest.graphs if graph.name == name)
