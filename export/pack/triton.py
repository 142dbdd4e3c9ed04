"""From a bundle to a model repository for NVIDIA's Triton Inference Server: ``config.pbtxt``, ``1/model.onnx``.

Triton serves the graph itself: pictures and texts are prepared by its clients, as docs/bundle.md describes. Layout and
configuration: Triton's "Model Repository" and "Model Configuration" pages, and its ONNX Runtime backend's page.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mope_deploy import __version__
from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt.profiles import DEFAULT_BATCH, Sizes
from mope_deploy.errors import ExportError, UsageError
from mope_deploy.extras import require
from mope_deploy.files import json_bytes, reason, whole_folder
from mope_deploy.manifest import MANIFEST, Graph, TensorSpec

__all__ = ["check_repository", "model_name", "schema", "write_repository"]

CONFIG, LABELS, MODEL, SOURCE = "config.pbtxt", "labels.txt", "model.onnx", "bundle.json"
PLATFORM = "onnxruntime_onnx"
MAX_BATCH, MAX_INSTANCES = 4096, 64
QUEUE_DELAY_US = 500  # that a request may wait for others to share its batch
KINDS = ("auto", "gpu", "cpu")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def write_repository(
    bundle: Bundle,
    folder: Path,
    *,
    graph: str | None = None,
    name: str | None = None,
    max_batch: int = 16,
    queue_delay_us: int = QUEUE_DELAY_US,
    instances: int | None = None,
    kind: str = "auto",
) -> Path:
    """Put a graph of a bundle into a model repository, as a new model or as the next version of one.

    A model that is there keeps its ``config.pbtxt``, whatever was tuned in it. All of the new version appears at once.

    Args:
        bundle: opened and verified.
        folder: the repository; made if it is not there.
        graph: name of the graph; by default the first that ONNX Runtime takes.
        name: of the model in the repository; by default the bundle's.
        max_batch: most samples that Triton puts into one call. It batches requests of the same shapes only: clients
            that pad their texts to a common length share batches. Always 1 for int8-dynamic.
        queue_delay_us: microseconds that a request may wait for others, to share a batch.
        instances: copies of the model on each device; None for Triton's choice of one on every GPU, or on the CPU.
        kind: where those copies are, one of :data:`KINDS`.

    Returns:
        The version's folder, ``folder/name/1``.

    Raises:
        MissingExtraError: the extra ``triton`` is not installed.
        UsageError: an argument that cannot be; no such graph, or one in parts; a model of another interface has that
            name, or something that is no model of a repository.
        ExportError: the labels or axes cannot be said in a repository, or it cannot be written.
    """
    chosen = bundle.graph(graph, engine="onnxruntime")
    if chosen.parts:
        raise UsageError(
            f"{chosen.name} of {bundle.path} is in parts, which one model of Triton cannot be",
            todo="export it without --split",
        )
    if chosen.precision == "int8-dynamic":  # its results would depend on batch-mates
        max_batch = 1
    name = model_name(bundle) if name is None else name
    _check_arguments(bundle, folder, name, max_batch, queue_delay_us, instances, kind)
    model = folder / name
    labels = _labels(bundle)
    config = _config(bundle, chosen, name, max_batch, queue_delay_us, instances, kind)
    try:
        if os.path.lexists(model):
            _check_compatible(model, config, labels)
            version = 1 + max((int(path.name) for path in model.iterdir() if path.name.isdecimal()), default=0)
            with whole_folder(model / str(version), error=ExportError) as staged:
                _put(bundle, chosen, staged)
        else:
            version = 1
            with whole_folder(model, error=ExportError) as staged:
                _put(bundle, chosen, staged / "1")
                (staged / LABELS).write_text(labels, encoding="utf-8")
                (staged / CONFIG).write_text(_text(config), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"the model repository {folder} cannot be written", received=reason(error)) from error
    return model / str(version)


@functools.cache
def schema() -> Any:
    """Triton's own ``model_config.proto`` as its client ships it: that one module, without the client's gRPC.

    Raises:
        MissingExtraError: the extra ``triton`` is not installed.
    """
    for package in ("google.protobuf", "tritonclient"):
        client = require(package, extra="triton", purpose="a model repository for Triton")
    file = Path(str(client.__file__)).with_name("grpc") / "model_config_pb2.py"
    return SimpleNamespace(**runpy.run_path(str(file)))


def _check_arguments(
    bundle: Bundle, folder: Path, name: str, max_batch: int, queue_delay_us: int, instances: int | None, kind: str
) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            "the name of a Triton model", received=repr(name[:60]), expected="letters, digits and _ . -, at most 128"
        )
    if not 1 <= max_batch <= MAX_BATCH:
        raise UsageError("the largest batch", received=max_batch, expected=f"1 to {MAX_BATCH:,}")
    if not 0 <= queue_delay_us <= 10_000_000:
        raise UsageError("the queue delay", received=queue_delay_us, expected="0 to 10,000,000 microseconds")
    if instances is not None and not 1 <= instances <= MAX_INSTANCES:
        raise UsageError("instances of a Triton model", received=instances, expected=f"1 to {MAX_INSTANCES}")
    if kind not in KINDS:
        raise UsageError("where instances run", received=repr(kind), expected=f"one of {', '.join(KINDS)}")
    if folder.resolve().is_relative_to(bundle.path.resolve()):
        raise UsageError(f"{folder} is a bundle, not a model repository", todo="choose another folder")
    _check_folder(folder)


def model_name(bundle: Bundle) -> str:
    """The bundle's own name with what Triton does not take replaced."""
    return _model_name(bundle.manifest.name)


def _model_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")[:128] or "mope"


def check_repository(folder: Path, name: str) -> None:
    """Find out before an export whether its model can be put there, as far as that does not depend on the graph.

    Args:
        folder: the repository.
        name: what the bundle will call itself.

    Raises:
        UsageError: ``folder`` is no folder, is a bundle or cannot be written; something else has the model's name.
    """
    _check_folder(folder)
    model = folder / _model_name(name)
    if os.path.lexists(model):
        _check_is_model(model)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"the model repository {folder} cannot be written",
            received=f"{there}: {reason(error)}",
            todo="name another folder with --triton",
        ) from error


def _check_folder(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} is a bundle, not a model repository", todo="choose another folder")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is a file", expected="a folder, or nothing yet")


def _check_is_model(model: Path) -> None:
    if model.is_symlink() or not (model / CONFIG).is_file():
        what = f"{model} exists and is no model of a Triton repository: no {CONFIG}"
        raise UsageError(what, todo="choose another name for this model, or another folder")


def _labels(bundle: Bundle) -> str:
    """The file of labels: one a line, in the order of the logits; no bundle has a label of several lines."""
    return "".join(f"{label}\n" for label in bundle.manifest.task.labels)


def _config(
    bundle: Bundle, graph: Graph, name: str, max_batch: int, queue_delay_us: int, instances: int | None, kind: str
) -> Any:
    """The ``ModelConfig`` of a new model."""
    from google.protobuf import json_format

    best = bundle.manifest.build.profile.get("batch", (0, Sizes.parse(DEFAULT_BATCH, axis="batch").opt, 0))[1]
    config: dict[str, Any] = {
        "name": name,
        "platform": PLATFORM,
        "max_batch_size": max_batch,
        "input": [_tensor(spec) for spec in graph.inputs],
        "output": [_tensor(spec) for spec in graph.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {
            "preferred_batch_size": sorted({size for size in (best, max_batch) if size <= max_batch}),
            "max_queue_delay_microseconds": queue_delay_us,
        },
    }
    if instances is not None:
        config["instance_group"] = [{"count": instances, "kind": f"KIND_{kind.upper()}"}]
    if graph.precision == "fp32":
        cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}
    return json_format.ParseDict(config, schema().ModelConfig())


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """An input or output without the batch axis, which ``max_batch_size`` stands for; axes that vary are -1."""
    if spec.shape[0] != "batch" or len(spec.shape) < 2:
        raise ExportError(f"Triton cannot batch {spec.name}", received=spec.form, expected="a first axis batch")
    sizes = [axis if isinstance(axis, int) else -1 for axis in spec.shape[1:]]
    found = {"name": spec.name, "data_type": "TYPE_" + spec.dtype.upper().replace("FLOAT", "FP"), "dims": sizes}
    return found | ({"label_filename": LABELS} if spec.name == "logits" else {})


def _text(config: Any) -> str:
    """The text of ``config.pbtxt``."""
    from google.protobuf import text_format

    return (
        f"# Written by mope-deploy {__version__}. Each version's {SOURCE} names the bundle it came from.\n"
        "# Only the newest version is served: a new one takes over at once. With use_tf32 0, products of float32 are\n"
        "# not rounded to TF32 (needs a Triton whose ONNX Runtime is 1.18 or newer).\n"
        f"{text_format.MessageToString(config, use_short_repeated_primitives=True)}"
    )


def _check_compatible(model: Path, config: Any, labels: str) -> None:
    """The model that is there takes and gives the same tensors, with labels in the same order."""
    from google.protobuf import text_format

    todo = "choose another name for this model, or another folder"
    _check_is_model(model)
    try:
        text = (model / CONFIG).read_text(encoding="utf-8")
        # A Triton newer than the client that is installed here may know more fields than it.
        theirs = _interface(text_format.Parse(text, schema().ModelConfig(), allow_unknown_field=True))
    except (ValueError, text_format.ParseError) as error:
        raise UsageError(f"{model / CONFIG} cannot be read: {reason(error)}", todo=todo) from error
    for what, ours in _interface(config).items():
        if theirs[what] != ours:
            raise UsageError(
                f"{model} is another model, of another {what}",
                received=theirs[what],
                expected=ours,
                todo=todo,
            )
    if (model / LABELS).read_text(encoding="utf-8") != labels:
        raise UsageError(f"{model} is a model with other labels, or in another order", todo=todo)


def _interface(config: Any) -> dict[str, Any]:
    """What a new version may not change for clients of the old ones."""

    def tensors(specs: Any) -> list[tuple[Any, ...]]:
        type_name = schema().DataType.Name
        return sorted(
            (spec.name, type_name(spec.data_type), list(spec.dims), getattr(spec, "label_filename", ""))
            for spec in specs  # inputs have no file of labels
        )

    return {
        "platform": config.platform or "none",
        "batching": "a batch axis" if config.max_batch_size else "no batch axis",
        "set of inputs": tensors(config.input),
        "set of outputs": tensors(config.output),
    }


def _put(bundle: Bundle, graph: Graph, version: Path) -> None:
    """One version: the graph under the name that Triton looks for, weights under the one that the graph has for them.

    A graph of several files has to be in a folder of that name.
    """
    version.mkdir(parents=True, exist_ok=True)
    place = version / MODEL if graph.data else version
    base = Path(graph.file).parent
    for name in graph.data:
        target = place / Path(name).relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(name), target)
    shutil.copyfile(bundle.file(graph.file), place / MODEL)
    source = {"name": bundle.manifest.name, "sha256": bundle.sha256, "graph": graph.name, "precision": graph.precision}
    (version / SOURCE).write_bytes(json_bytes(source))
