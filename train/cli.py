"""The command line of training: a recipe in, a run folder out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import mope_deploy
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import UsageError
from mope_deploy.extras import require

__all__ = ["app", "main"]

INTERRUPTED = 130
_MOST_GROUPS = 20  # that are shown

app = typer.Typer(rich_markup_mode=None)

_HELP = """Train a MoPE model on frozen encoders.

RECIPE is a YAML file or the name of a shipped recipe (--list); any value in it can be set behind it:

    python -m train digits-ve

    python -m train my.yaml data.train=train.jsonl optim.lr_main=1e-3 model.experts=16

    python -m train --resume runs/digits-ve-20260131-120000

Several processes: torchrun --nproc_per_node 2 -m train RECIPE. Everything that can be set: docs/training.md.
"""


@app.command(help=_HELP)
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", show_default=False, help="What to train.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run; RECIPE may be left out.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Repeat the evaluation of this trained run, on its rows as they are now."),
    ] = None,
    standalone: Annotated[
        bool,
        typer.Option(
            "--standalone", help="Also store the frozen encoders in RUN/best: the same as run.standalone=true."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and encoders, print sizes, write nothing.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with every value and stop.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the shipped recipes and stop.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> int:
    if version:
        _say(f"mope-deploy {mope_deploy.__version__}")
        return 0
    require("pydantic", extra="train", purpose="training")
    require("yaml", extra="train", purpose="training")
    from train.recipe import check_recipe, read_recipe, shipped_recipes, to_yaml
    from train.run_folder import Run, free_folder, open_run, open_trained

    if list_recipes:
        for name, about in shipped_recipes().items():
            _say(f"{name:<16} {about}")
        return 0
    source, overrides = _split(arguments or [])
    if standalone:
        overrides.append("run.standalone=true")
    if evaluate is not None:
        if source is not None or resume is not None or dry_run or show:
            raise UsageError("--evaluate RUN takes the run's own recipe", expected="nothing but KEY=VALUE beside it")
        return _evaluate(*open_trained(evaluate, overrides=overrides))
    values = None if source is None else read_recipe(source)
    if values is None and resume is None:
        raise UsageError("no recipe given", expected="a YAML file or a shipped name", todo="see --list and --help")
    if resume is None:
        assert values is not None  # or the error above
        recipe = check_recipe(values, overrides, what=f"recipe {source}")
        if recipe.resume:
            if recipe.run.dir is None:
                raise UsageError("resume=true needs run.dir=RUN", todo="or use --resume RUN")
            resume = Path(recipe.run.dir)
        elif show:
            _say(to_yaml(recipe), end="")
            return 0
    run: Run | None = None
    if resume is not None:
        run, recipe = open_run(resume, recipe=values, overrides=overrides)
    else:
        free_folder(recipe)  # a taken folder is reported before anything is imported
    _require_all()
    from train.run import fit, plan

    if dry_run:
        _print_plan(plan(recipe), recipe.name)
        return 0
    outcome = fit(recipe, command=shlex.join(["python", "-m", "train", *sys.argv[1:]]), resume=run)
    interrupted, folder = outcome.status == "interrupted", outcome.run.folder
    if os.environ.get("RANK", "0") == "0":
        if interrupted:
            err.print(f"interrupted; continue with: python -m train --resume {folder}", markup=False)
        else:
            _print_outcome(folder, outcome.evaluation)
    return INTERRUPTED if interrupted else 0


def _evaluate(run: Any, recipe: Any) -> int:
    _require_all()
    from train.run import evaluate_again

    _print_outcome(run.folder, evaluate_again(recipe, run).evaluation)
    return 0


def _require_all() -> None:
    # Threads that wait must not spin: beside any other job spinning made steps five times slower (docs/NOTES.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for module in ("torch", "timm", "transformers", "accelerate", "datasets", "sklearn", "matplotlib", "tensorboard"):
        require(module, extra="train", purpose="training")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse, 130 interrupted."""
    return run_app(app, argv)


def _say(line: str, *, end: str = "\n") -> None:
    out.print(line, markup=False, end=end)


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if one is given, and the overrides behind it."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_file()):
        return None, list(arguments)
    return arguments[0], list(arguments[1:])


def _print_plan(plan: Any, name: str) -> None:
    if plan.rows is None:
        _say(f"{name}: the data does not exist yet and would be generated or fetched")
    else:
        _say("data       " + ", ".join(f"{split} {rows:,}" for split, rows in plan.rows.items()))
    _say(f"labels     {', '.join(plan.labels[:20])}{' …' if len(plan.labels) > 20 else ''}")
    _say(f"parameters {plan.parameters['trained']:,} trained of {plan.parameters['total']:,}")
    if plan.steps is not None:
        _say(f"steps      {plan.steps:,}")


def _print_outcome(folder: Path, evaluation: Mapping[str, Any]) -> None:
    _say(
        f"{evaluation['split']}: accuracy {evaluation['accuracy']:.2%}, F1 macro {evaluation['f1_macro']:.2%}, "
        f"micro {evaluation['f1_micro']:.2%} ({evaluation['samples']:,} rows)"
    )
    for field, groups in evaluation.get("by", {}).items():
        shown = [f"{name} {group['accuracy']:.1%}" for name, group in list(groups.items())[:_MOST_GROUPS]]
        more = f", … and {len(groups) - len(shown):,} more in evaluation.json" if len(groups) > len(shown) else ""
        _say(f"accuracy by {field}: {', '.join(shown)}{more}")
    if routing := evaluation.get("routing"):
        _say(f"experts in use per layer, of {routing['experts']}: {', '.join(map(str, routing['used_experts']))}")
    if "baselines" in evaluation:
        out.print(_baseline_table(evaluation))
    _say(f"run folder: {folder}\nnext: mope-export {folder} --format onnx")


def _baseline_table(evaluation: Mapping[str, Any]) -> Table:
    table = Table(title="the same frozen encoders", title_justify="left", box=None)
    for name in ("method", "trained parameters", "accuracy", "seeds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for head in evaluation["baselines"]:
        seeds = ", ".join(f"{value:.1%}" for value in head["accuracy"]["seeds"])
        method = f"{head['name']}, {'MLP' if head['head'] == 'mlp' else head['head']}"
        table.add_row(method, f"{head['parameters']:,}", f"{head['accuracy']['mean']:.1%}", seeds)
    table.add_row("MoPE", f"{evaluation['parameters']['trained']:,}", f"{evaluation['accuracy']:.1%}", "this run")
    return table
