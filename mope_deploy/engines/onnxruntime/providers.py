"""ONNX Runtime's execution providers: their short names, the options each is given, and whether it is there.

Ours are the CPU and CUDA. Any other is handed through with the options that came with it: our way to TensorRT is
engines of our own (:mod:`mope_deploy.engines.tensorrt`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.extras import installed_versions
from mope_deploy.fields import did_you_mean, shown

__all__ = [
    "CPU",
    "CUDA",
    "PROVIDERS",
    "Chosen",
    "Providers",
    "check_providers",
    "choose_providers",
    "distributions",
    "full_name",
    "overwritten",
    "provider_states",
    "tf32_is_allowed",
]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
OPTIONS: Mapping[str, Mapping[str, str]] = {  # names and values as in ONNX Runtime 1.18, the oldest supported
    CUDA: {
        "use_tf32": "0",  # on by default, and ten bits of mantissa are not fp32
        "cudnn_conv_algo_search": "HEURISTIC",  # by default each new shape is benchmarked, for one convolution
        "arena_extend_strategy": "kSameAsRequested",  # by default it doubles, which small boards have no room for
    }
}
DISTRIBUTIONS = (  # of one and the same module: each overwrites the other's files
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
)

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]
Chosen = list[tuple[str, dict[str, Any]]]


def full_name(name: str) -> str:
    """ONNX Runtime's name of a provider: ``"cuda"`` → ``"CUDAExecutionProvider"``; full names stay as they are.

    Raises :class:`UsageError` for neither.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    if name.endswith("ExecutionProvider"):
        return name
    raise UsageError(
        "provider",
        received=repr(name),
        expected=f"{', '.join(PROVIDERS)}, or ONNX Runtime's own name of one",
        todo=did_you_mean(name, PROVIDERS),
    )


def choose_providers(wanted: Providers | None, available: Sequence[str]) -> Chosen:
    """What a session is given: every provider asked for, its options, and the CPU for nodes that they do not take.

    Args:
        wanted: names, or (name, options) pairs whose options are taken as they are; the CPU by default.
        available: what this onnxruntime has.

    Raises:
        UsageError: an unknown name, or no list of names and pairs.
        EngineError: this onnxruntime does not have a provider; what it has, and how to get the other.
    """
    chosen: Chosen = []
    for one in check_providers(wanted) or [CPU]:
        name = full_name(one if isinstance(one, str) else one[0])
        if name not in available:
            raise _absent(name, available)
        chosen.append((name, dict(OPTIONS.get(name, {}) if isinstance(one, str) else one[1])))
    if CPU not in dict(chosen):
        chosen.append((CPU, {}))
    return chosen


def check_providers(wanted: Any) -> Providers | None:
    """``wanted`` as :func:`choose_providers` takes it. Raises :class:`UsageError` if it is of another type."""

    def one(provider: object) -> bool:
        if isinstance(provider, tuple) and len(provider) == 2:
            return isinstance(provider[0], str) and isinstance(provider[1], Mapping)
        return isinstance(provider, str)

    listed = isinstance(wanted, list | tuple)
    if wanted is None or (listed and all(map(one, wanted))):
        return wanted
    wrong = next(item for item in wanted if not one(item)) if listed else wanted
    expected = 'a list of names and (name, options) pairs: ["cuda"], [("cuda", {"device_id": 1})]'
    raise UsageError("providers", received=shown(wrong), expected=expected)


def tf32_is_allowed(chosen: Chosen) -> bool:
    """Whether the first provider is CUDA and may round float32 products to TF32."""
    name, options = chosen[0]
    return name == CUDA and str(options.get("use_tf32", "1")).lower() not in ("0", "false")


def distributions() -> dict[str, str]:
    """Installed distributions of onnxruntime → version; more than one have overwritten each other."""
    return installed_versions(DISTRIBUTIONS)


def overwritten() -> str | None:
    """What to say where more than one distribution is installed; None where all is well."""
    if len(found := distributions()) < 2:
        return None
    return f"{_named(found)} have overwritten each other: pip uninstall them all, then install one"


def provider_states(available: Sequence[str], device: Device) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(short name, whether it runs here or why not, the options it is or would be given) of each of our providers."""
    for short, name in PROVIDERS.items():
        if name not in available:
            state = f"not in this onnxruntime ({_installed()})"
        elif name != CPU and device.no_gpu is not None:
            state = f"in this onnxruntime, but cannot run here: {device.no_gpu}"
        else:
            state = "available"
        yield short, state, OPTIONS.get(name, {})


def _installed() -> str:
    return _named(distributions()) or "a build of its own"


def _named(found: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in found.items())


def _absent(name: str, available: Sequence[str]) -> EngineError:
    """Never advises to install one distribution of onnxruntime over another."""
    found, todo = distributions(), None
    if name == CUDA and set(found) == {"onnxruntime"}:
        todo = (
            "it is in onnxruntime-gpu, which must stand in onnxruntime's place: pip uninstall onnxruntime, then "
            "pip install 'mope-deploy[ort-gpu]'; on a Jetson the onnxruntime-gpu wheel made for its JetPack"
        )
    elif len(found) > 1:
        todo = overwritten()
    elif name == CUDA:
        todo = "it takes a build of onnxruntime-gpu that includes it; this one is left as it is"
    expected = f"one of {', '.join(available)}"
    return EngineError(f"this onnxruntime has no {name}", received=_installed(), expected=expected, todo=todo)
