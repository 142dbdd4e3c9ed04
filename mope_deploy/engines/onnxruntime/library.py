"""onnxruntime, imported here and nowhere else: what keeps it from calling home must stand before its import."""

from __future__ import annotations

import os
from types import ModuleType

from mope_deploy.engines.onnxruntime.providers import distributions
from mope_deploy.errors import EngineError, MissingExtraError
from mope_deploy.extras import require

__all__ = ["TELEMETRY_OFF", "import_onnxruntime", "one_line"]

TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime(module: str = "onnxruntime") -> ModuleType:
    """onnxruntime or a module of it, without its telemetry.

    Releases from about 1.31 on look up a host for events and write a device's id under the user's cache folder as soon
    as they are imported, unless ``ORT_DISABLE_TELEMETRY`` is set. It is set here for this process, and for those that
    it starts, unless the user has set it to anything. Where onnxruntime was imported before, nothing is changed.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it cannot be imported.
    """
    os.environ.setdefault(TELEMETRY_OFF, "1")
    try:
        return require(module, extra="ort", purpose="running a bundle")
    except MissingExtraError as error:
        if found := distributions():  # never advise to install one over the other
            named = " and ".join(f"{name} {version}" for name, version in found.items())
            raise EngineError(
                f"{named} is installed and cannot be imported: {one_line(error.__cause__ or error)}",
                todo="install what is missing, or that same package again",
            ) from error
        raise MissingExtraError(
            error.what,
            todo="run: pip install 'mope-deploy[ort]' for a CPU or 'mope-deploy[ort-gpu]' for CUDA; "
            "on a Jetson, the onnxruntime-gpu wheel made for its JetPack",
        ) from error
    except Exception as error:  # a wheel for another numpy, Python or CUDA stumbles while it is imported
        raise EngineError(
            f"onnxruntime is installed and cannot be imported: {one_line(error)}",
            todo=f"install {' or '.join(distributions()) or 'it'} again",
        ) from error


def one_line(error: BaseException) -> str:
    """An error's text; of a long one the end, which says what happened where the beginning names functions."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else f"… {message[-300:]}"
