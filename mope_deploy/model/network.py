"""The Hugging Face hub where there is a network, and what was fetched from it before where there is none.

The hub's libraries try for over a minute, with a line a try, before they say that there is no network. Whether the hub
can be reached at all is asked once, for at most a few seconds; if not, they work offline from their cache.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["hub", "offline_reason"]

_PATIENCE = 5.0  # seconds


@contextmanager
def hub() -> Iterator[None]:
    """The hub's libraries, without their lines about retries, and offline while the hub cannot be reached.

    That they are offline is a variable of their library, set while the block runs.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    logging.set_verbosity_error()
    constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
    try:
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
