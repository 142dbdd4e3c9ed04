"""Train a recipe with several seeds and report every one of them, beside its baselines.

    python -m benchmarks.seeds digits-ve --seeds 5 --markdown docs/results.md

A seed sets initial values, the order of rows and dropout; data and encoders stay the same. Finished seeds are kept in
--runs and not trained again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe_machine
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import MopeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def seeds(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")] = "digits-ve",
    count: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0, 1, …")] = 5,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/seeds"),
    markdown: Annotated[Path | None, typer.Option(help="Write the table there.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe.")] = None,
) -> None:
    """Train with each seed and print the table of all of them."""
    found = [_train(recipe, seed, runs / f"{recipe}-seed{seed}", settings or []) for seed in range(count)]
    page = _page(recipe, found)
    out.print(page, markup=False)
    if markdown is not None:
        markdown.write_text(page, encoding="utf-8")


def _train(recipe: str, seed: int, run: Path, settings: list[str]) -> dict[str, Any]:
    """The evaluation and the described run of one seed."""
    if not (run / "evaluation.json").is_file():
        err.print(f"seed {seed}: training into {run}", markup=False)
        # The baselines do not depend on MoPE's seed: once is enough.
        baselines = "true" if seed == 0 else "false"
        call = [sys.executable, "-m", "train", recipe, f"seed={seed}", f"run.dir={run}", f"baselines={baselines}"]
        if subprocess.run([*call, *settings], check=False).returncode:
            raise MopeError(f"seed {seed} failed", todo="see its message above")
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    described = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {"seed": seed, "evaluation": evaluation, "run": described}


def _page(recipe: str, found: list[dict[str, Any]]) -> str:
    first = found[0]["evaluation"]
    groups = sorted(next(iter(first.get("by", {}).values()), {}))
    field = next(iter(first.get("by", {})), "")
    lines = [
        f"# {recipe}: {len(found)} seeds, all of them",
        "",
        f"Made by `python -m benchmarks.seeds {recipe} --seeds {len(found)}`.",
        f"Accuracy in % on the {first['split']} split.",
        f"MoPE trains {first['parameters']['trained']:,} of {first['parameters']['total']:,} parameters.",
        "",
        _row(["seed", "accuracy", *groups, "validation", "experts in use per layer", "training s"]),
        _row(["---", *["---:"] * (len(groups) + 2), "---", "---:"]),
    ]
    for one in found:
        evaluation, run = one["evaluation"], one["run"]
        by = evaluation.get("by", {}).get(field, {})
        validation = next(value for name, value in run["metrics"]["validation"].items() if name != "epoch")
        used = evaluation.get("routing", {}).get("used_experts", [])
        experts = evaluation.get("routing", {}).get("experts", 0)
        lines.append(
            _row(
                [
                    str(one["seed"]),
                    _percent(evaluation["accuracy"]),
                    *(_percent(by[name]["accuracy"]) for name in groups),
                    _percent(validation),
                    ", ".join(map(str, used)) + (f" of {experts}" if used else ""),
                    f"{run['seconds']['training']:.0f}",
                ]
            )
        )
    accuracies = [one["evaluation"]["accuracy"] for one in found]
    spread = f"mean {_percent(statistics.mean(accuracies))}, median {_percent(statistics.median(accuracies))}"
    lines += ["", f"{spread}, lowest {_percent(min(accuracies))}, highest {_percent(max(accuracies))}.", ""]
    if first.get("baselines"):
        lines += ["The same frozen encoders without conditioning, mean of each head's own seeds:", ""]
        lines += [_row(["baseline", "accuracy", "trained parameters"]), _row(["---", "---:", "---:"])]
        for head in first["baselines"]:
            name = f"{head['name']}, {head['head']}"
            lines.append(_row([name, _percent(head["accuracy"]["mean"]), f"{head['parameters']:,}"]))
        lines.append("")
    machine = describe_machine()
    lines += [
        f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}."
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{share:.1%}"[:-1]


if __name__ == "__main__":
    raise SystemExit(run_app(app))
