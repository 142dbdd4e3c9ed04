"""The Hugging Face hub where there is a network, and what was fetched from it before where there is none.

The hub's libraries try for over a minute, with a line a try, before they say that there is no network. Whether the hub
can be reached at all is asked for at most a few seconds, and the answer stands for a minute; if it cannot, they work
offline from their cache. Of local folders nothing is asked.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["hub", "offline_reason"]

_PATIENCE = 5.0  # seconds
_REMEMBERED = 60.0  # seconds; loading one model asks for several files of several encoders
_one_at_a_time = RLock()
_answers: dict[str, tuple[float, bool]] = {}  # by endpoint: until when it stands, and whether the hub can be reached


@contextmanager
def hub(*, local: bool = False) -> Iterator[None]:
    """The hub's libraries, without their lines about retries, and offline while the hub cannot be reached.

    Both are variables of their library, set while the block runs, by one thread at a time: two that overlapped would
    leave them changed for good.

    Args:
        local: whether what is loaded lies in a local folder; then nothing is asked and nothing changed.
    """
    if local:
        yield
        return
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    with _one_at_a_time:
        verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
        try:
            logging.set_verbosity_error()
            constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            logging.set_verbosity(verbosity)


def offline_reason(error: BaseException) -> str | None:
    """Why what was to be fetched is not here, where that is for want of a network; None for any other failure."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError):
            host = urlsplit(constants.ENDPOINT).hostname
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{host} cannot be reached"
            return f"it was not fetched before, and {why}"
        seen = seen.__cause__ or seen.__context__
    return None


def _reachable(endpoint: str) -> bool:
    """Whether a connection to the hub opens; with a proxy in between that is for the libraries to find out."""
    if getproxies():
        return True
    until, answer = _answers.get(endpoint, (0.0, False))
    if time.monotonic() >= until:
        answer = _connects(endpoint)
        _answers[endpoint] = time.monotonic() + _REMEMBERED, answer
    return answer


def _connects(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    answers: list[bool] = []

    def ask() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread: looking up a name knows no timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers and answers[0])
