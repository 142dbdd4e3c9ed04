"""Commands on a machine that refuses: full disks, read-only ones, no HOME, a closed or full standard output."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.child import environment
from benchmarks.reliability.inputs import Found
from benchmarks.reliability.kit import Kit, command

__all__ = ["try_machine"]

_LIMIT_S = 600.0
# A file system of our own in a name space of our own, as {options}; the command's output goes there.
_MOUNTED = "mount -t tmpfs -o size={size} tmpfs {place} && {prepare} && exec {command}"


def try_machine(kit: Kit) -> Found:
    """Run every command on each such machine: it fails in one line, or it does what it does elsewhere."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="mope-machine-") as temporary:
        place = Path(temporary)
        cases = {**_outputs(kit), **_without_home(kit, place), **(_disks(kit, place / "disk") if _can_mount() else {})}
        for number, (name, (call, fails)) in enumerate(cases.items()):
            found.add(number, *_tried(name, call, fails=fails))
        if not _can_mount():
            found.outcomes["disks: not tried, this system mounts none for us"] += 1
    return found


Cases = dict[str, tuple[list[str], bool]]  # what it is → the command line, and whether it must fail


def _outputs(kit: Kit) -> Cases:
    commands = {
        "mope info": command("mope", "info", kit.bundle),
        "mope info --json": command("mope", "info", kit.bundle, "--json"),
        "mope run --data": command("mope", "run", kit.bundle, "--data", kit.rows),
        "mope eval": command("mope", "eval", kit.bundle, kit.rows),
        "mope verify": command("mope", "verify", kit.bundle),
        "train --list": command("train", "--list"),
        "mope-export --help": command("mope-export", "--help"),
    }
    return {
        f"{name}, standard output {how}": (["sh", "-c", f"{shlex.join(call)} {redirected}"], True)
        for name, call in commands.items()
        for how, redirected in (("full", ">/dev/full"), ("closed", ">&-"))
    }


def _without_home(kit: Kit, place: Path) -> Cases:
    bare = ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", "-u", "USER", "-u", "LOGNAME"]
    return {
        "mope verify without HOME": ([*bare, *command("mope", "verify", kit.bundle)], False),
        "mope run without HOME": (
            [*bare, *command("mope", "run", kit.bundle, "--data", kit.rows, "--out", place / "home.jsonl")],
            False,
        ),
        "train without HOME": ([*bare, *command("train", kit.recipe, f"run.dir={place / 'home'}")], False),
    }


def _disks(kit: Kit, place: Path) -> Cases:
    place.mkdir()
    writers: Mapping[str, list[str]] = {
        "mope run --out": command("mope", "run", kit.bundle, "--data", kit.rows, "--out", place / "out.jsonl"),
        "mope-export": command("mope-export", kit.run, "--out", place / "bundle"),
        "train": command("train", kit.recipe, f"run.dir={place / 'run'}"),
    }
    states = {"full": ("8k", "true"), "read-only": ("8k", f"mount -o remount,ro {place}")}
    return {
        f"{name} on a {state} disk": (
            [
                *("unshare", "-m", "sh", "-c"),
                _MOUNTED.format(size=size, place=place, prepare=prepare, command=shlex.join(call)),
            ],
            True,
        )
        for name, call in writers.items()
        for state, (size, prepare) in states.items()
    }


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        call = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", place]
        try:
            return os.geteuid() == 0 and subprocess.run(call, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def _tried(name: str, call: list[str], *, fails: bool) -> tuple[str, str]:
    try:
        done = subprocess.run(
            call,
            capture_output=True,
            text=True,
            env=environment(threads=1),
            timeout=_LIMIT_S,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return "hang", name
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in done.stderr or "unexpected" in done.stderr:
        return "traceback", f"{name}: {' '.join(done.stderr.split())[-300:]}"
    if fails and (done.returncode == 0 or len(errors) != 1):
        return "wrong", f"{name}: exit code {done.returncode}, {len(errors)} errors: {done.stderr.strip()[-200:]}"
    if not fails and done.returncode:
        return "wrong", f"{name}: exit code {done.returncode}: {done.stderr.strip()[-200:]}"
    return ("refused" if fails else "used"), ""
