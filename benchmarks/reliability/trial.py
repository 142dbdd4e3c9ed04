"""The process that tries mutants: ``python -m benchmarks.reliability.trial SUBJECT KIT SEED FIRST LAST``.

One line of JSON a mutant, before and after it: whoever reads them sees which one hangs, and where to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.reliability.kit import Kit
from benchmarks.reliability.subjects import SUBJECTS, Try
from mope_deploy.errors import MopeError, printable

__all__ = ["ADDRESS_BYTES", "main"]

ADDRESS_BYTES = 16 * 2**30  # of a process: what asks for more is refused by the system, and that is a fault
_MOST_CHARACTERS = 5000  # of a message


def main(arguments: list[str]) -> int:
    """Try the mutants from FIRST up to LAST."""
    name, kit, seed, first, last = arguments
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    with tempfile.TemporaryDirectory(prefix="mope-reliability-") as folder:
        make, _ = SUBJECTS[name]
        attempt = make(Kit(Path(kit)), Path(folder))
        say(ready=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(int(first), int(last)):
            say(begins=number)
            began = time.monotonic()
            outcome, detail = tried(attempt, Random(f"{seed} {name} {number}"))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            say(number=number, outcome=outcome, detail=detail, seconds=time.monotonic() - began, kilobytes=peak)
    return 0


def tried(attempt: Try, random: Random) -> tuple[str, str]:
    """``used``, ``refused``, ``wrong`` or ``traceback``, and what was said."""
    with contextlib.suppress(MopeError):
        try:
            wrong = attempt(random)
        except MopeError as error:
            said = str(error)
            # A recipe's problems are a line each.
            if len(said) > _MOST_CHARACTERS or any(line != printable(line) for line in said.split("\n  ")):
                return "wrong", f"not fit to be printed: {said[:200]!r}"
            return "refused", said[:200]
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"[:300]
        return ("used", "") if wrong is None else ("wrong", wrong[:300])
    raise AssertionError  # every way out is above


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
