"""``mope verify``: is a bundle what was exported, and does this device compute it?"""

from __future__ import annotations

import dataclasses

from mope_deploy.cli.options import AsJson, BundleFolder, EngineOptions, takes_engine_options
from mope_deploy.cli.printing import print_json, say, tell
from mope_deploy.errors import EngineError

__all__ = ["verify"]


@takes_engine_options(but=["cache_mb"])
def verify(bundle: BundleFolder, options: EngineOptions, as_json: AsJson = False) -> None:
    """Check every file's hash, then repeat the golden samples: preprocessing bit for bit, outputs within tolerance."""
    from mope_deploy.bundle import Bundle
    from mope_deploy.engines import built_engines, engines_not_run

    opened = Bundle.open(bundle, verify=True)
    runs_here = "tensorrt" if options.engine == "tensorrt" else "onnxruntime"
    canonical = opened.graph(options.graph, engine=runs_here).name
    names = [canonical]
    if options.graph is None:
        names += [g.name for g in opened.manifest.graphs if g.takes(runs_here) and g.name != canonical]
    results, unusable = [], {}
    for name in names:
        first = name == canonical
        how = dataclasses.replace(options, graph=name, rebuild=options.rebuild and first, cache_mb=0)
        try:
            predictor = how.load(bundle, verify=False, announce=first and bool(built_engines(opened, name)))
            results.append((predictor, predictor.verify()))
        except EngineError as error:
            # A variant may need a newer engine than this device has. One that runs and is wrong raises ParityError.
            if first:
                raise
            unusable[name] = str(error)
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
            f"samples, inputs equal to the last bit, logits error {result.logits_error:.1e}{routing}{ties}"
        )
    for name, reason in unusable.items():
        tell(f"note: {name} cannot be used here, and is not unless asked for: {reason}")
    for file, reason in not_run.items():
        tell(f"note: {file} was not run: {reason}")
    if unlisted := opened.unlisted():
        tell(f"note: {len(unlisted)} files are not part of the bundle: {', '.join(unlisted[:10])}")
    say(f"{bundle} is as it was exported")
