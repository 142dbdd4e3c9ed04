"""Commands that are killed with SIGKILL at random moments, and what the next command makes of what they left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.child import environment
from benchmarks.reliability.inputs import Found
from benchmarks.reliability.kit import Kit, command
from mope_deploy.files import sha256
from mope_deploy.progress import track

__all__ = ["KILLED", "try_kills"]

_LIMIT_S = 600.0
Check = Callable[[], str | None]


@dataclass(frozen=True)
class Killed:
    """A command that is killed, and what has to be so afterwards.

    Attributes:
        call: the command line.
        check: whether what was left is whole, and the same command succeeds: what is wrong, or None.
    """

    call: list[str]
    check: Check


def _train(kit: Kit, folder: Path) -> Killed:
    """Training: continued, or begun again by the same command, it ends with the weights of an uninterrupted run."""
    run = folder / "run"
    call = command("train", kit.recipe, f"run.dir={run}")

    def check() -> str | None:
        started = (run / "run.json").exists()
        if started and json.loads((run / "run.json").read_bytes()).get("status") == "finished":
            said = None  # killed on its way out: there is nothing left to do
        else:
            said = _run(command("train", "--resume", run) if started else call)
        if said is not None and started:  # killed before the first state: the same command starts anew
            said = _run(call)
        return said or _same(run / "last/model.safetensors", kit.run / "last/model.safetensors") or _left(folder)

    return Killed(call, check)


def _resume(kit: Kit, folder: Path) -> Killed:
    """Continuing a run that was interrupted in the middle."""
    first = _train(kit, folder)
    _kill(
        first.call, after=lambda: (folder / "run/checkpoints").is_dir() and any((folder / "run/checkpoints").iterdir())
    )
    return Killed(command("train", "--resume", folder / "run"), first.check)


def _export(kit: Kit, folder: Path) -> Killed:
    """Exporting over an older bundle: the old one, or the new one."""
    bundle = Path(shutil.copytree(kit.bundle, folder / "bundle"))
    call = command("mope-export", kit.run, "--out", bundle, "--overwrite")

    def check() -> str | None:
        return _run(command("mope", "verify", bundle)) or _run(call) or _left(folder)

    return Killed(call, check)


def _build(kit: Kit, folder: Path) -> Killed:
    """Building an engine twice: an engine and a sidecar that belong together, and no process that works on."""
    bundle = Path(shutil.copytree(kit.bundle, folder / "bundle"))
    call = command("mope", "build", bundle, "--backend", "tensorrt_rtx", "--compute", "8.6", "--batch", "1:1:1")

    def check() -> str | None:
        if (working := _working_in(folder)) is not None:
            return working
        said = _run(command("mope", "info", bundle)) or _run(call)
        sidecar = bundle / "engines/model.tensorrt_rtx.json"
        engine = bundle / "engines/model.tensorrt_rtx.engine"
        if said is None and json.loads(sidecar.read_bytes())["engine"]["sha256"] != sha256(engine):
            said = "the engine and its sidecar do not belong together"
        return said or _left(folder)

    return Killed(call, check)


def _predict(kit: Kit, folder: Path) -> Killed:
    """Predicting a file: the old output, or the new one."""
    out = folder / "out.jsonl"
    out.write_text("old\n", encoding="utf-8")
    call = command("mope", "run", kit.bundle, "--data", kit.rows, "--out", out)

    def check() -> str | None:
        lines = out.read_text(encoding="utf-8").splitlines()
        if lines != ["old"] and len(lines) != len(kit.rows.read_text(encoding="utf-8").splitlines()):
            return f"{out.name} has {len(lines)} lines"
        return _run(call) or _left(folder)

    return Killed(call, check)


# name → what is killed, and how many of the whole 200 times
KILLED: Mapping[str, tuple[Callable[[Kit, Path], Killed], int]] = {
    "train": (_train, 40),
    "train --resume": (_resume, 30),
    "mope-export": (_export, 30),
    "mope build": (_build, 30),
    "mope run --out": (_predict, 70),
}


def try_kills(kit: Kit, name: str, count: int, *, seed: int = 0) -> Found:
    """Kill a command ``count`` times, at random moments of the time that it takes undisturbed."""
    found, (make, _) = Found(), KILLED[name]
    with _place() as folder:
        undisturbed = make(kit, folder)
        began = time.monotonic()
        if (said := _run(undisturbed.call)) is not None:
            found.outcomes[f"not tried, it fails by itself: {said}"] += 1
            return found
        lasts = time.monotonic() - began
    random = Random(f"{seed} {name}")
    for number in track(range(count), what=f"killing {name}", total=count):
        with _place() as folder:
            one = make(kit, folder)
            moment = random.uniform(0.0, lasts)
            finished = _kill(one.call, after=_later(moment))
            wrong = one.check()
            if wrong is not None:
                found.add(number, "wrong", f"killed after {moment:.2f} of {lasts:.2f} s: {wrong}")
            else:
                found.outcomes["finished before" if finished else "recovered"] += 1
    return found


def _later(seconds: float) -> Callable[[], bool]:
    """Whether that much time has passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mope-killed-") as folder:
        yield Path(folder)


def _kill(call: list[str], *, after: Callable[[], bool]) -> bool:
    """Start a command and kill it, not its children, as soon as ``after`` says; True where it ended before."""
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(call, stdout=noise, stderr=noise, env=environment(threads=1))
        while process.poll() is None and not after():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        return process.wait() == 0


def _run(call: list[str]) -> str | None:
    """What went wrong, if anything did."""
    done = subprocess.run(
        call, capture_output=True, text=True, env=environment(threads=1), timeout=_LIMIT_S, check=False
    )
    if done.returncode == 0 and "Traceback" not in done.stderr:
        return None
    return f"{' '.join(call[2:])} left with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"


def _same(one: Path, other: Path) -> str | None:
    return None if sha256(one) == sha256(other) else f"{one.name} is not that of an uninterrupted run"


def _left(folder: Path) -> str | None:
    """Temporary files that are still there after the command succeeded."""
    left = [path.relative_to(folder) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", ".next")]
    return f"left behind: {', '.join(map(str, left))}" if left else None


def _working_in(folder: Path) -> str | None:
    """A process that still works on something there, half a minute after its parent died."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        found = [line for line in _command_lines() if str(folder) in line]
        if not found:
            return None
        time.sleep(0.1)
    return f"still running: {found[0]}"


def _command_lines() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
