"""The exception tree.

Everything a user can cause ends in a :class:`MopeError`: the command lines print its one message and leave with its
``exit_code`` (2 for misuse, 1 for failure). Checks of our own invariants use ``assert`` instead.
"""

from __future__ import annotations

import re

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "MediaError",
    "MissingExtraError",
    "MopeError",
    "ParityError",
    "UsageError",
    "printable",
]

# What a terminal obeys instead of showing it, or what no encoding holds: control characters but a line's end and a tab,
# line separators, what turns the direction of what follows, and halves of surrogate pairs.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` as a terminal may have it, whoever wrote it: ``\\u001b`` for an escape. JSON keeps its value."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class MopeError(Exception):
    """A failure a user can act on.

    Args:
        what: what went wrong, naming the file, field or option.
        received: what was found there.
        expected: what would have been right.
        todo: what to do about it.

    What the message repeats of foreign input is made :func:`printable`.
    """

    exit_code = 1

    def __init__(self, what: str, *, received: object = None, expected: object = None, todo: str | None = None) -> None:
        self.what, self.received, self.expected, self.todo = what, received, expected, todo
        parts = [what]
        if received is not None:
            parts.append(f"received {received}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if todo is not None:
            parts.append(todo)
        super().__init__(printable("; ".join(parts)))


class UsageError(MopeError):
    """The call itself was wrong: an argument, an option, a combination of both."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or a model configuration that cannot be used."""


class MissingExtraError(UsageError):
    """An optional package is needed and not installed; the message has the pip command."""


class DataError(MopeError):
    """A row of a data file that cannot be used; the message names file and line."""


class MediaError(DataError):
    """An image, text, audio or video that cannot be decoded or is outside the stated limits."""


class CheckpointError(MopeError):
    """A checkpoint that is damaged, incomplete or belongs to other encoders."""


class BundleError(MopeError):
    """A bundle that is damaged, altered, of an unknown schema, or that could not be written."""


class EngineError(MopeError):
    """An inference engine that is absent, refuses the graph or fails while it runs."""


class ExportError(MopeError):
    """A model that could not be exported."""


class ParityError(ExportError):
    """An exported file that does not compute what the eager model computes."""
