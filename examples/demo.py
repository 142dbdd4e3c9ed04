"""The whole path on the embedded data: train → export → verify → evaluate → run, by the same commands a user types.

    make demo        (or: python -m examples.demo)

Leaves the run in runs/demo and the bundle in bundles/demo; both are made anew each time.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from examples.picture import draw, save_page
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import MopeError

RUN, BUNDLE = Path("runs/demo"), Path("bundles/demo")
# Far above the third that one modality alone gives, and below every full run so far, whose seeds and processors differ
# by 14 points (docs/results.md).
LEAST_ACCURACY = 0.6
_ENTRIES = {"mope": "mope_deploy.cli", "mope-export": "export.cli", "python -m train": "train.cli"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes to the recipe digits-ve.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure latencies.")] = 5.0,
) -> None:
    """Train, export, verify and run MoPE on digits-ve."""
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    _step("python -m train", "digits-ve", f"run.dir={RUN}", *(settings or []))
    trained = time.monotonic()
    _step("mope-export", str(RUN), "--format", "onnx", "--out", str(BUNDLE), "--overwrite")
    _step("mope", "verify", str(BUNDLE))
    test = _test_rows()
    evaluated = json.loads(_step("mope", "eval", str(BUNDLE), str(test), "--json", show=False))
    figures = _latency(seconds)
    evaluation = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    out.print(_results(evaluation, evaluated, figures))
    if not settings:
        _check(evaluation["accuracy"], evaluated["accuracy"])
    _example(test)
    out.print(
        f"{time.monotonic() - started:.0f} s in all, {trained - started:.0f} s of them training. "
        f"Look at {RUN}/expert_usage.png and {RUN}/confusion_matrix.png.",
        markup=False,
    )


def _step(command: str, *arguments: str, show: bool = True) -> str:
    """Run one of the project's commands as a user would; its standard output is shown, or returned.

    Raises:
        MopeError: it failed; what it said is on the terminal already.
    """
    err.print(f"\n$ {command} {shlex.join(arguments)}", style="bold", markup=False)
    # What the console script does, without asking where it was installed.
    entry = f"import sys; from {_ENTRIES[command]} import main; sys.exit(main())"
    call = [sys.executable, "-c", entry, *arguments]
    done = subprocess.run(call, stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MopeError(f"{command} left with exit code {done.returncode}", todo="see its message above")
    return done.stdout or ""


def _test_rows() -> Path:
    """The run's own test split, where its run.json says it is."""
    described = json.loads((RUN / "run.json").read_text(encoding="utf-8"))
    return RUN / described["data"]["test"]  # an absolute path stays what it is


def _latency(seconds: float) -> dict[str, Any]:
    file = RUN / "latency.json"
    # One thread, as the recipe trains: beside other work a second one waits more than it computes.
    call = [
        sys.executable,
        "-m",
        "benchmarks.latency",
        str(RUN),
        str(BUNDLE),
        "--threads",
        "1",
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run([*call, "--json", str(file)], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise MopeError("the latency benchmark failed", todo="see its message above")
    return json.loads(file.read_text(encoding="utf-8"))


def _results(evaluation: dict[str, Any], exported: dict[str, Any], figures: dict[str, Any]) -> Table:
    """Accuracy on the test split, trained parameters and latency of everything that was measured."""
    machine = figures["machine"]
    table = Table(
        title="digits-ve, test split",
        caption=f"trained: number of trained parameters; latency of one sample on one thread of "
        f"{machine['cpu']}, bundle ÷ eager {figures['ratio_of_medians']:.3f}",
    )
    for column in ("model", "accuracy %", "trained", "p50 ms", "p95 ms"):
        table.add_column(column, justify="left" if column == "model" else "right")
    parameters = f"{evaluation['parameters']['trained']:,}"
    for name, accuracy, row in (
        ("MoPE, eager PyTorch", evaluation["accuracy"], figures["eager"]),
        ("MoPE, bundle (ONNX Runtime)", exported["accuracy"], figures["bundle"]),
    ):
        table.add_row(name, f"{accuracy:.2%}"[:-1], parameters, f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}")
    table.add_section()
    for head in evaluation["baselines"]:
        name = f"{head['name']}, {head['head']}"
        table.add_row(name, f"{head['accuracy']['mean']:.2%}"[:-1], f"{head['parameters']:,}", "", "")
    return table


def _check(eager: float, bundle: float) -> None:
    """The whole recipe learns the task, and the bundle decides as the model does; near-ties may fall either way.

    Raises:
        MopeError: one of the two does not hold.
    """
    if eager < LEAST_ACCURACY or abs(eager - bundle) > 0.005:
        raise MopeError(
            "the demo did not come out as it should",
            received=f"accuracy {eager:.1%} of the model, {bundle:.1%} of its bundle",
            expected=f"at least {LEAST_ACCURACY:.0%}, and the same for both",
        )


def _example(test: Path) -> None:
    """One test sample with its picture, the bundle's prediction and where its routers sent it."""
    row = json.loads(test.read_text(encoding="utf-8").splitlines()[1])
    image = test.parent / row["image"]
    answer = json.loads(
        _step(
            "mope", "run", str(BUNDLE), "--image", str(image), "--text", row["text"], "--routing", "--json", show=False
        )
    )
    if out.is_terminal:
        out.print(draw(image))
    page = RUN / "example.png"
    save_page(page, image, row["text"], row["label"], answer)
    out.print(f"picture     {image}; with its routing: {page}", markup=False)
    out.print(f"text        {row['text']}", markup=False)
    out.print(f"truth       {row['label']}", markup=False)
    out.print(f"prediction  {answer['label']} ({answer['probability']:.1%})", markup=False)
    for i, weights in enumerate(answer["routing"], start=1):
        best = sorted(range(len(weights)), key=lambda k: -weights[k])[:3]
        shares = ", ".join(f"expert {k + 1} {weights[k]:.0%}" for k in best)
        out.print(f"layer {i}     {shares}", markup=False)


if __name__ == "__main__":
    raise SystemExit(run_app(app))
