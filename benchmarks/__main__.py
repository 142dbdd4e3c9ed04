"""``python -m benchmarks``: every figure of docs/performance.md, together or one by one.

python -m benchmarks all --out report.json            # base encoders: an hour or more, and 20 GB of temporary files
python -m benchmarks all --quick --out report.json    # small encoders, few points: two and a half minutes
python -m benchmarks fp32-ratio --out fp32.json       # one of them
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.comparisons import COMPARISONS
from benchmarks.reliability.command import reliability
from benchmarks.settings import FORMS, SIZES, Settings
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import MopeError, UsageError

if TYPE_CHECKING:
    from benchmarks.graphs import Workshop
    from benchmarks.result import Result

__all__ = ["BENCHMARKS", "app", "main"]

# name → what it measures: the comparisons, then modules that have a function of the same name.
BENCHMARKS = {name: comparison.help for name, comparison in COMPARISONS.items()} | {
    "device-process": "A new process up to its first prediction: time and memory.",
    "training-step": "One training step: time and memory.",
    "growth": "Latency against batch size, text length, K and L.",
    "memory": "Memory of a process that runs one graph.",
    "operators": "Time by operator, and the distance to the roofline.",
}
# Seconds and rounds of each comparison, processes; tiny encoders only show that it works.
_LENGTHS = {"full": (60.0, 20, 11), "quick": (1.0, 5, 3), "tiny": (0.05, 3, 1)}

# Read once, when torch is first imported: threads of PyTorch that spin would slow down whatever is called next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HELP = "Measure what MoPE costs, and say which targets are missed."
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=_HELP)

OUT = typer.Option("--out", metavar="FILE", help="JSON to write; a page in Markdown and plots go beside it.")
QUICK = typer.Option("--quick", help="Small encoders, few points, few rounds: about two and a half minutes.")
SIZE = typer.Option(help=f"Encoders: {', '.join(SIZES)}; base by default, small with --quick. Targets are about base.")
FORM = typer.Option(help=f"Of MoPE's layers: {' or '.join(FORMS)}.")
THREADS = typer.Option(min=1, help="Of ONNX Runtime and PyTorch.")
SECONDS = typer.Option(min=0.01, max=86_400, help="Of each comparison; by default 60, or 1 with --quick.")
BUNDLE = typer.Option(help="For device-process, instead of one of digits-ve's encoders.")
WORK = typer.Option(help="Folder that keeps the graphs for the next run; by default a temporary one.")


def _command(names: Sequence[str]) -> Callable[..., None]:
    """The command that runs these benchmarks."""

    def command(
        to: Annotated[Path | None, OUT] = None,
        quick: Annotated[bool, QUICK] = False,
        size: Annotated[str | None, SIZE] = None,
        form: Annotated[str, FORM] = "prefix",
        threads: Annotated[int, THREADS] = 2,
        seconds: Annotated[float | None, SECONDS] = None,
        bundle: Annotated[Path | None, BUNDLE] = None,
        work: Annotated[Path | None, WORK] = None,
    ) -> None:
        if to is not None and (to.suffix != ".json" or not to.absolute().parent.is_dir()):
            raise UsageError("--out", received=to, expected="a file ending in .json, in a folder that is there")
        if work is not None and not work.is_dir():
            raise UsageError("--work", received=work, expected="a folder")
        size = size or ("small" if quick else "base")
        for name, value, known in (("--size", size, SIZES), ("--form", form, FORMS)):
            if value not in known:
                raise UsageError(name, received=value, expected=" or ".join(known))
        usual, rounds, processes = _LENGTHS["tiny" if size == "tiny" else "quick" if quick else "full"]
        with tempfile.TemporaryDirectory(prefix="mope-benchmarks-") as temporary:
            settings = Settings(
                folder=work or Path(temporary),
                size=size,
                form=form,
                threads=threads,
                seconds=usual if seconds is None else seconds,
                rounds=rounds,
                few=quick,
                processes=processes,
                bundle=bundle,
            )
            run(names, settings, to=to)

    return command


for _name, _about in BENCHMARKS.items():
    app.command(_name, help=_about)(_command([_name]))
app.command("all", help="All of these.")(_command(list(BENCHMARKS)))
app.command("reliability", help="Damaged inputs, kills, refusing machines: docs/reliability.md.")(reliability)


@app.command("mutations", help="Single faults in finished files of every precision: which does a gate refuse?")
def mutations(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A trained run folder, with its data.")],
    work: Annotated[Path, typer.Option(metavar="FOLDER", help="Keeps what was judged: an interrupted run goes on.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples, and every tenth mutant.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Of judging, over all bundles; then the tables.")] = 45.0,
) -> None:
    from benchmarks.mutations import run_mutations, summary
    from mope_deploy.files import write_file

    if not work.is_dir():
        raise UsageError("--work", received=work, expected="a folder")
    page = summary(run_mutations(source, work, quick=quick, minutes=minutes))
    write_file(work / "mutations.md", page)
    out.print(page, markup=False)


def run(names: Sequence[str], settings: Settings, *, to: Path | None) -> None:
    """Run benchmarks one after the other; the report is written anew after each, so that an interruption loses one.

    Raises:
        MopeError: one or more of them failed; the others ran.
    """
    from benchmarks.graphs import Workshop
    from benchmarks.machine import describe_machine
    from benchmarks.report import section, target_lines, write_report
    from benchmarks.targets import judge

    report: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}",
        "machine": describe_machine(),
        "settings": {key: value for key, value in vars(settings).items() if key not in ("folder", "bundle")},
        "results": {},
        "targets": [],
    }
    workshop = Workshop(settings)
    failed = []
    for number, name in enumerate(names, start=1):
        err.print(f"{name} ({number} of {len(names)})", style="bold", markup=False)
        try:
            report["results"][name] = _function(name)(workshop).to_dict()
        except Exception as error:  # the others are still worth having after an hour
            if os.environ.get("MOPE_DEBUG"):
                raise
            said = str(error) if isinstance(error, MopeError) else f"{type(error).__name__}: {error}"
            failed.append(f"{name}: {said}")
            report["results"][name] = {"error": said}
        report["targets"] = judge(report["results"], size=settings.size, chosen=names)
        if to is not None:
            write_report(to, report)
        out.print("\n".join(section(name, report["results"][name])) + "\n", markup=False)
    asked = [row for row in report["targets"] if len(names) > 1 or row["benchmark"] in names]
    for line in target_lines(asked):
        out.print(line, markup=False)
    if to is not None:
        err.print(f"wrote {to} and {to.with_suffix('.md')}", markup=False)
    if failed:
        raise MopeError("; ".join(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse."""
    return run_app(app, argv, name="python -m benchmarks")


def _function(name: str) -> Callable[[Workshop], Result]:
    """The benchmark of that name, imported here: some need what others do not."""
    if name in COMPARISONS:
        from benchmarks.ratios import ratios

        return partial(ratios, comparison=COMPARISONS[name])
    module = name.replace("-", "_")
    return getattr(importlib.import_module(f"benchmarks.{module}"), module)


if __name__ == "__main__":
    raise SystemExit(main())
