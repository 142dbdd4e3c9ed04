"""``mope-export check``: a bundle's graphs against the trained model once more."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from export.cli.options import Data, GateSamples, Report, Run, Samples, Seed, Version, check_report, new_app
from export.cli.show import load, steps, write_report
from export.limits import GATE_SAMPLES
from export.packages import require_packages
from export.source import find_source
from mope_deploy.console import out

__all__ = ["check_app"]

_HELP = """Repeat the comparison of a bundle's graphs with the trained model they came from.

The exit code is 1 if they do not compute the same.
"""

check_app = new_app()


@check_app.command(help=_HELP)
def check(
    run: Run,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)],
    data: Data = None,
    samples: Samples = None,
    gate_samples: GateSamples = None,
    seed: Seed = 0,
    report: Report = None,
    version: Version = False,
) -> int:
    from mope_deploy.bundle import Bundle

    started = time.monotonic()
    check_report(report)
    source = find_source(run, data=data)
    opened = Bundle.open(bundle)
    with steps() as step:
        step("loading PyTorch")
        require_packages()
        from export.gate import PrecisionReport, require_parity, require_precision
        from export.recheck import check_bundle

        step(f"loading {source.checkpoint}")
        reports = check_bundle(
            load(source),
            opened,
            data=source.data,
            samples=samples,
            gate_samples=gate_samples or GATE_SAMPLES,
            seed=seed,
            on_step=step,
        )
    for found in reports.values():
        out.print(found.table())
    if report is not None:
        write_report(report, reports)
    for found in reports.values():
        if isinstance(found, PrecisionReport):
            require_precision(found)
        else:
            require_parity(found)
    for graph in opened.manifest.graphs:
        if graph.name not in reports:
            out.print(f"{graph.name} ({graph.precision}) was not checked: ONNX Runtime has no such arithmetic here")
    out.print(f"{bundle} computes what {run} computes ({time.monotonic() - started:.1f} s)", markup=False)
    return 0
