"""ONNX Runtime's execution providers: their short names, the options each is given, and whether it is there.

Names and values of options are those of ONNX Runtime's own pages on its CUDA, TensorRT and TensorRT-RTX providers; all
but the last provider's exist in 1.18, the oldest supported.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.profiles import Profile, profile_shapes
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.fields import nearest
from mope_deploy.manifest import TensorSpec

__all__ = [
    "CPU",
    "CUDA",
    "PROVIDERS",
    "TENSORRT",
    "TENSORRT_RTX",
    "Chosen",
    "Providers",
    "cache_folder",
    "cache_root",
    "choose_providers",
    "default_options",
    "distributions",
    "full_name",
    "make_cache",
    "plans_shapes",
    "provider_states",
    "tf32_is_allowed",
]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, TENSORRT_RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT, "tensorrt-rtx": TENSORRT_RTX}
PLANNING = (TENSORRT, TENSORRT_RTX)  # these build engines of their own for a range of shapes
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
CACHE = "MOPE_CACHE"
_FOLDERS = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt-rtx"}
DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")  # of one and the same module: each overwrites the other's files

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]
Chosen = list[tuple[str, dict[str, Any]]]


def full_name(name: str) -> str:
    """ONNX Runtime's name of a provider: ``"cuda"`` → ``"CUDAExecutionProvider"``; full names stay as they are.

    Raises:
        UsageError: neither.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    if name.endswith("ExecutionProvider"):
        return name
    hint = nearest(name, PROVIDERS)
    raise UsageError(
        "provider",
        received=repr(name),
        expected=f"{', '.join(PROVIDERS)}, or ONNX Runtime's own name of one",
        todo=f"did you mean {hint!r}?" if hint else None,
    )


def choose_providers(
    wanted: Providers | None,
    available: Sequence[str],
    *,
    inputs: Sequence[TensorSpec] = (),
    profile: Profile | None = None,
    cache: Path | None = None,
) -> Chosen:
    """What a session is given: every provider asked for, those it falls back on, and the options of each.

    Nodes that TensorRT does not take go to CUDA where this onnxruntime has it, all others to the CPU.

    Args:
        wanted: names, or (name, options) pairs whose options are taken as they are; the CPU by default.
        available: what this onnxruntime has.
        inputs: of the graph.
        profile: sizes of its axes, for providers that plan for them.
        cache: folder of the graph, in which a provider may keep what it built.

    Raises:
        UsageError: an unknown name.
        EngineError: this onnxruntime does not have a provider; what it has, and how to get the other.
    """
    chosen: Chosen = []
    for one in wanted or [CPU]:
        name, own = (one, None) if isinstance(one, str) else (one[0], dict(one[1]))
        name = full_name(name)
        if name not in available:
            raise _absent(name, available)
        options = default_options(name, inputs=inputs, profile=profile, cache=cache) if own is None else own
        chosen.append((name, options))
    names = [name for name, _ in chosen]
    if names[0] in PLANNING and CUDA in available and CUDA not in names:
        chosen.append((CUDA, default_options(CUDA)))
    if CPU not in names:
        chosen.append((CPU, {}))
    return chosen


def default_options(
    name: str, *, inputs: Sequence[TensorSpec] = (), profile: Profile | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Options of one provider, as strings."""
    if name == CUDA:
        return {
            "use_tf32": "0",  # on by default, and ten bits of mantissa are not fp32
            "cudnn_conv_algo_search": "HEURISTIC",  # by default each new shape is benchmarked, for one convolution
            "arena_extend_strategy": "kSameAsRequested",  # by default it doubles, which small boards have no room for
        }
    if name == TENSORRT:
        # With both precisions off it makes a strongly typed network: the types are those of the file.
        options = {"trt_fp16_enable": "0", "trt_int8_enable": "0"}
        if cache is not None:
            folder = str(cache / _FOLDERS[name])
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
        return options | _shapes("trt", inputs, profile)
    if name == TENSORRT_RTX:
        options = {"enable_cuda_graph": "0"}  # captured for one shape, and ours vary
        if cache is not None:
            options["nv_runtime_cache_path"] = str(cache / _FOLDERS[name])
        return options | _shapes("nv", inputs, profile)
    return {}


def plans_shapes(wanted: Providers | None) -> bool:
    """Whether the first provider builds an engine for a range of shapes, which it should be told."""
    first = (wanted or [CPU])[0]
    return full_name(first if isinstance(first, str) else first[0]) in PLANNING


def tf32_is_allowed(chosen: Chosen, environment: MutableMapping[str, str]) -> bool:
    """Whether the first provider may round float32 products to TF32. Switches it off where nobody decided.

    The TensorRT providers have no option for it (onnxruntime issue 26029), only the environment of the process.
    """
    name, options = chosen[0]
    if name == CUDA:
        return str(options.get("use_tf32", "1")).lower() not in ("0", "false")
    if name in PLANNING:
        return environment.setdefault(TF32_OVERRIDE, "0") != "0"
    return False


def cache_folder(sha256: str, graph: str) -> Path | None:
    """Where providers may keep what they build from one graph of one bundle; None where there is no home for it.

    In :func:`cache_root` a folder per bundle.

    Args:
        sha256: of the bundle's manifest.
        graph: name of the ONNX file in the bundle.
    """
    root = cache_root()
    return None if root is None else root / sha256[:16] / graph.replace("/", "_")


def cache_root() -> Path | None:
    """Where this project keeps what it would else make again; None where there is no home for it.

    ``$MOPE_CACHE``, else ``$XDG_CACHE_HOME/mope-deploy``, else ``~/.cache/mope-deploy``.
    """
    root = os.environ.get(CACHE)
    if not root and os.environ.get("XDG_CACHE_HOME"):
        root = os.path.join(os.environ["XDG_CACHE_HOME"], "mope-deploy")
    root = root or os.path.expanduser("~/.cache/mope-deploy")
    return Path(root) if os.path.isabs(root) else None


def make_cache(folder: Path | None) -> Path | None:
    """``folder``, made where it is not there; None where that fails: all works without, but builds again each time."""
    if folder is None:
        return None
    try:
        for name in _FOLDERS.values():
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def distributions() -> dict[str, str]:
    """Installed distributions of onnxruntime → version; more than one have overwritten each other."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provider_states(
    available: Sequence[str],
    device: Device,
    *,
    inputs: Sequence[TensorSpec] = (),
    profile: Profile | None = None,
    cache: Path | None = None,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(short name, whether it runs here or why not, the options it is or would be given) of each provider.

    Args:
        available: what this onnxruntime has.
        device: this machine.
        inputs, profile, cache: see :func:`choose_providers`.
    """
    for short, name in PROVIDERS.items():
        if name not in available:
            state = f"not in this onnxruntime ({_installed()})"
        elif name != CPU and device.no_gpu is not None:
            state = f"in this onnxruntime, but cannot run here: {device.no_gpu}"
        else:
            state = "available"
        yield short, state, default_options(name, inputs=inputs, profile=profile, cache=cache)


def _shapes(prefix: str, inputs: Sequence[TensorSpec], profile: Profile | None) -> dict[str, str]:
    """``input_ids:1x8,attention_mask:1x8`` for the least, best and greatest shapes; one input's needs all others'."""
    ranges = {} if profile is None else {spec.name: profile_shapes(spec, profile) for spec in inputs}
    varying = {name: shapes for name, shapes in ranges.items() if shapes is not None}
    if not varying:
        return {}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, shapes[i]))}" for name, shapes in varying.items()
        )
        for i, kind in enumerate(("min", "opt", "max"))
    }


def _installed() -> str:
    return " and ".join(f"{name} {version}" for name, version in distributions().items()) or "a build of its own"


def _absent(name: str, available: Sequence[str]) -> EngineError:
    """Never advises to install one distribution of onnxruntime over another."""
    found = distributions()
    if name not in PROVIDERS.values():
        todo = None
    elif name == TENSORRT_RTX:
        todo = "it takes a build of onnxruntime that includes it; mope build --backend tensorrt_rtx needs none"
    elif set(found) == {"onnxruntime"}:
        todo = (
            "it is in onnxruntime-gpu, which must stand in onnxruntime's place: pip uninstall onnxruntime, then "
            "pip install 'mope-deploy[ort-gpu]'; on a Jetson the onnxruntime-gpu wheel made for its JetPack"
        )
    elif len(found) > 1:
        todo = "two distributions of onnxruntime have overwritten each other: pip uninstall both, then install one"
    else:
        todo = "it takes a build of onnxruntime-gpu that includes it; this one is left as it is"
    return EngineError(
        f"this onnxruntime has no {name}",
        received=_installed(),
        expected=f"one of {', '.join(available)}",
        todo=todo,
    )
