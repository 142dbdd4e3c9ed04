"""The one logger that a TensorRT library is given in this process: it keeps the first, and ignores any later one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from mope_deploy.engines.tensorrt.backends import Backend

__all__ = ["Log", "shared_log"]


@dataclass
class Log:
    """What a library has said since :meth:`clear`."""

    logger: Any = None  # what the library takes
    errors: list[str] = field(default_factory=list)  # some come with a result that looks good and is not
    warnings: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.errors.clear()
        self.warnings.clear()


@functools.cache
def shared_log(backend: Backend) -> Log:
    """The log of a library; everything of ours that makes a builder, parser or runtime uses it."""
    trt, log = backend.module, Log()

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                log.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.warnings.append(message)

    log.logger = Logger()
    return log
