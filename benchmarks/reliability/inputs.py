"""Damaged inputs by the thousand, tried in processes that may hang, crash or grow without taking this one along."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks.child import environment
from benchmarks.reliability.kit import Kit
from mope_deploy.errors import MopeError
from mope_deploy.progress import track

__all__ = ["HANG_S", "MEMORY_MB", "Found", "try_inputs"]

HANG_S = 20.0
MEMORY_MB = 1024  # that one process may grow by over all its mutants
_START_S = 300.0


@dataclass
class Found:
    """What became of one subject's mutants.

    Attributes:
        outcomes: used, refused, wrong, traceback, hang, crash → how many.
        faults: number of the mutant and what is wrong with it.
        slowest: seconds of one mutant.
        megabytes: by which the process grew.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    megabytes: float = 0.0

    def add(self, number: int, outcome: str, detail: str) -> None:
        """Count one mutant."""
        self.outcomes[outcome] += 1
        if outcome not in ("used", "refused"):
            self.faults.append((number, f"{outcome}: {detail}"))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "outcomes": dict(self.outcomes)}


def try_inputs(kit: Kit, name: str, count: int, *, seed: int = 0) -> Found:
    """Try ``count`` mutants of a subject.

    Raises:
        MopeError: the processes that try them do not come up.
    """
    found = Found()
    answers = _answers(kit, name, count, seed, found)
    for answer in track(answers, what=name, total=count):
        found.add(answer["number"], answer["outcome"], answer["detail"])
        found.slowest = max(found.slowest, answer["seconds"])
        found.megabytes = max(found.megabytes, answer["kilobytes"] / 1024)
    if found.megabytes > MEMORY_MB:
        found.faults.append((-1, f"memory: grew by {found.megabytes:,.0f} MB, more than {MEMORY_MB:,}"))
    return found


def _answers(kit: Kit, name: str, count: int, seed: int, found: Found) -> Iterator[dict[str, Any]]:
    """Every mutant's answer; after one that hangs or crashes a new process goes on with the next."""
    first = 0
    while first < count:
        arguments = (name, str(kit.folder.absolute()), str(seed), str(first), str(count))
        with tempfile.TemporaryFile() as noise:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reliability.trial", *arguments],
                stdout=subprocess.PIPE,
                stderr=noise,
                env=environment(threads=1),
            )
            assert process.stdout is not None
            ready, begun, how = False, first, "crash"
            try:
                for message in _lines(process.stdout):
                    if message is None:
                        how = "hang"
                        break
                    ready = ready or "ready" in message
                    begun = message.get("begins", begun)
                    if "outcome" in message:
                        yield message
                        first = message["number"] + 1
            finally:
                process.kill()
                code = process.wait()
            if first >= count:
                return
            noise.seek(0)
            said = " ".join(noise.read().decode("utf-8", errors="replace").split())[-300:]
        if not ready:
            raise MopeError(f"mutants of {name} cannot be tried: {said}")
        detail = f"no answer within {HANG_S:g} s" if how == "hang" else f"the process ended with {code}: {said}"
        yield {
            "number": begun,
            "outcome": how,
            "detail": detail,
            "seconds": HANG_S if how == "hang" else 0,
            "kilobytes": 0,
        }
        first = begun + 1


def _lines(pipe: IO[bytes]) -> Iterator[dict[str, Any] | None]:
    """Each line as it comes; None where it does not in time."""
    selector = selectors.DefaultSelector()
    selector.register(pipe, selectors.EVENT_READ)
    limit, buffer = _START_S, b""
    while selector.select(limit):
        block = os.read(pipe.fileno(), 65_536)
        if not block:
            return
        *lines, buffer = (buffer + block).split(b"\n")
        for line in lines:
            yield json.loads(line)
        limit = HANG_S
    yield None
