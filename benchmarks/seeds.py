"""Train a recipe with several seeds and report every one of them, machine by machine, beside the baselines.

    python -m benchmarks.seeds digits-ve --seeds 5 --json docs/results.json --markdown docs/results.md

A seed sets initial values, the order of rows and dropout; data and encoders stay the same. A processor that adds in
another order trains another model from the same seed: so every figure belongs to a machine. ``--json`` keeps those of
all machines; this one's are replaced. Finished seeds are kept in --runs and not trained again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe_machine
from benchmarks.report import markdown_table
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import MopeError, UsageError
from mope_deploy.files import json_bytes, write_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def seeds(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")] = "digits-ve",
    count: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0, 1, …")] = 5,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/seeds"),
    kept: Annotated[Path | None, typer.Option("--json", help="Figures of all machines; this one's go there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe.")] = None,
) -> None:
    """Train with each seed and print the page of all of them."""
    what: dict[str, Any] = {"recipe": recipe, "settings": settings or []}
    known = _read(kept, what) if kept is not None and kept.exists() else what | {"machines": {}}
    found = [_train(recipe, seed, runs / f"{recipe}-seed{seed}", settings or []) for seed in range(count)]
    machine = describe_machine()
    name = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}"
    shared = {key: value for key, value in found[0][0].items() if key in ("split", "parameters", "baselines")}
    known["machines"][name] = shared | {"seeds": [_summary(*one) for one in found]}
    text = page(known)
    out.print(text, markup=False)
    if kept is not None:
        write_file(kept, json_bytes(known))
    if markdown is not None:
        write_file(markdown, text)


def _read(path: Path, what: dict[str, Any]) -> dict[str, Any]:
    """Earlier figures of the same recipe."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known["machines"], dict) and {key: known[key] for key in what} == what:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    wanted = f"figures of {what['recipe']} with the same --set"
    raise UsageError("--json", received=path, expected=wanted, todo="name a new file")


def _train(recipe: str, seed: int, run: Path, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One seed's ``evaluation.json`` and ``run.json``."""
    if not (run / "evaluation.json").is_file():
        err.print(f"seed {seed}: training into {run}", markup=False)
        # The baselines do not depend on MoPE's seed: once is enough.
        baselines = "true" if seed == 0 else "false"
        call = [sys.executable, "-m", "train", recipe, f"seed={seed}", f"run.dir={run}", f"baselines={baselines}"]
        if subprocess.run([*call, *settings], check=False).returncode:
            raise MopeError(f"seed {seed} failed", todo="see its message above")
    evaluation, described = (json.loads((run / f"{name}.json").read_bytes()) for name in ("evaluation", "run"))
    return evaluation, described


def _summary(evaluation: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one seed."""
    routing = evaluation.get("routing", {})
    used = ", ".join(map(str, routing.get("used_experts", [])))
    return {
        "accuracy": evaluation["accuracy"],
        "by": {name: group["accuracy"] for by in evaluation.get("by", {}).values() for name, group in by.items()},
        "validation": next(value for name, value in run["metrics"]["validation"].items() if name != "epoch"),
        "experts": used and f"{used} of {routing['experts']}",
        "seconds": run["seconds"]["training"],
    }


def page(known: dict[str, Any]) -> str:
    """The Markdown page of all machines' figures; what was not kept of a run is a dash."""
    machines = known["machines"]
    every = [seed for machine in machines.values() for seed in machine["seeds"]]
    first = next(iter(machines.values()))
    command = ["python", "-m", "benchmarks.seeds", known["recipe"], *(f"--set={one}" for one in known["settings"])]
    lines = [
        f"# {known['recipe']}: {len(every)} runs, all of them",
        "",
        f"Made by `{shlex.join(command)}`.",
        f"Accuracy in % on the {first['split']} split.",
        f"MoPE trains {first['parameters']['trained']:,} of {first['parameters']['total']:,} parameters.",
        "A processor that adds in another order trains another model from the same seed: to be expected is a range.",
        "",
        f"All runs: {_spread(every)}.",
    ]
    for name, machine in machines.items():
        groups = sorted({group for seed in machine["seeds"] for group in seed.get("by", {})})
        columns = ("seed", "accuracy", *groups, "validation", "experts in use per layer", "training s")
        rows = []
        for number, seed in enumerate(machine["seeds"]):
            shares = [seed["accuracy"], *(seed["by"].get(group) for group in groups), seed.get("validation")]
            took = f"{seed['seconds']:.0f}" if "seconds" in seed else "–"
            rows.append((number, *map(_percent, shares), seed.get("experts") or "–", took))
        lines += ["", f"## {name}", "", *markdown_table(columns, rows)]
        if len(rows) > 1:
            lines += ["", f"{_spread(machine['seeds']).capitalize()}."]
        if heads := machine.get("baselines"):
            lines += ["", "The same frozen encoders without conditioning, mean of each head's own seeds:", ""]
            cells = [
                (f"{h['name']}, {h['head']}", _percent(h["accuracy"]["mean"]), f"{h['parameters']:,}") for h in heads
            ]
            lines += markdown_table(("baseline", "accuracy", "trained parameters"), cells)
    return "\n".join(lines) + "\n"


def _spread(seeds: Sequence[dict[str, Any]]) -> str:
    values = sorted(seed["accuracy"] for seed in seeds)
    middle = f"mean {_percent(statistics.mean(values))}, median {_percent(statistics.median(values))}"
    return f"{middle}, lowest {_percent(values[0])}, highest {_percent(values[-1])}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"[:-1]


if __name__ == "__main__":
    raise SystemExit(run_app(app))
