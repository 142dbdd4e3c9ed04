"""``python -m benchmarks reliability``: everything that is tried, with a page of what became of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.reliability.inputs import Found
from benchmarks.reliability.report import read_results, write_report
from mope_deploy.console import err, out
from mope_deploy.errors import MopeError, UsageError

__all__ = ["reliability"]

_QUICK = 50  # of the whole's counts one part, at least two of each
_PREDICTIONS, _IN_EACH_THREAD = 1_000_000, 20_000


@dataclass(frozen=True)
class Trial:
    """One line of the page: what is tried, how often, and how."""

    about: str
    count: int
    run: Callable[[int], Found]


def reliability(
    to: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="JSON to write, its page beside it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"One part in {_QUICK} of everything.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Just this; may be given again.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps what is tried for the next run.")] = None,
) -> None:
    """Damaged inputs, kills, refusing machines, threads, a million predictions. With --out what is done is kept."""
    if to is not None and (to.suffix != ".json" or not to.absolute().parent.is_dir()):
        raise UsageError("--out", received=to, expected="a file ending in .json, in a folder that is there")
    from benchmarks.reliability.kit import make_kit

    with tempfile.TemporaryDirectory(prefix="mope-reliability-") as temporary:
        kit = make_kit(work or Path(temporary))
        trials = _trials(kit)
        if unknown := [name for name in only or () if name not in trials]:
            raise UsageError("--only", received=unknown[0], expected=f"one of {', '.join(trials)}")
        results: dict[str, Any] = read_results(to, quick=quick) if to is not None else {}
        for name, trial in trials.items():
            if name in results or (only and name not in only):
                continue
            count = max(2, trial.count // _QUICK) if quick else trial.count
            err.print(f"{name}: {count:,}", style="bold", markup=False)
            results[name] = {"about": trial.about, "count": count, **trial.run(count).to_dict()}
            if to is not None:
                write_report(to, results, quick=quick)
            out.print(f"{name}: {results[name]['outcomes']}", markup=False)
            for number, fault in results[name]["faults"][:20]:
                out.print(f"  {number}: {fault}", markup=False)
    if faults := sum(len(result["faults"]) for result in results.values()):
        raise MopeError(f"{faults:,} faults", todo="see above, or the page beside --out")


def _trials(kit: Any) -> Mapping[str, Trial]:
    from benchmarks.reliability.endurance import THREADS, try_memory, try_threads
    from benchmarks.reliability.inputs import try_inputs
    from benchmarks.reliability.killed import KILLED, try_kills
    from benchmarks.reliability.machine import try_machine
    from benchmarks.reliability.subjects import SUBJECTS

    trials = {
        name: Trial("damaged inputs", count, partial(try_inputs, kit, name)) for name, (_, count) in SUBJECTS.items()
    }
    trials |= {
        name: Trial("killed with SIGKILL", count, partial(try_kills, kit, name)) for name, (_, count) in KILLED.items()
    }
    trials["machine"] = Trial("a machine that refuses", 1, lambda _: try_machine(kit))
    trials["threads"] = Trial(f"predictions in each of {THREADS} threads", _IN_EACH_THREAD, partial(try_threads, kit))
    trials["memory"] = Trial("predictions in one process", _PREDICTIONS, partial(try_memory, kit))
    return trials
