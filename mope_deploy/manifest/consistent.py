"""What no single field of a manifest can say: that its parts fit each other."""

from __future__ import annotations

from mope_deploy.errors import BundleError
from mope_deploy.fields import shown, twice
from mope_deploy.limits import MAX_TOKENIZER_BYTES
from mope_deploy.manifest.types import Graph, Manifest, TensorSpec, conditions_name, y_name
from mope_deploy.preprocess import MODALITIES, Tensors

__all__ = ["AGAIN", "check_consistent"]

AGAIN = "copy or export the bundle again"  # what to do about a damaged one


def check_consistent(manifest: Manifest, where: str) -> None:
    """Raise :class:`BundleError` where two fields are at odds."""
    if (manifest.text is None) != (manifest.tokenizer is None):
        raise BundleError(f"{where}.preprocess", received="text or tokenizer alone", expected="both, or null for both")
    modalities = manifest.modalities
    prepared = [name for name in MODALITIES if getattr(manifest, name) is not None]
    if sorted(modalities) != sorted(prepared):
        expected = f"those that preprocess prepares, once each: {', '.join(prepared) or 'none'}"
        raise BundleError(f"{where}.modalities", received=", ".join(modalities), expected=expected)
    if not set(manifest.missing) <= set(manifest.complementary):
        expected = f"some of the complementary modalities: {', '.join(manifest.complementary) or 'none'}"
        raise BundleError(f"{where}.preprocess.missing", received=", ".join(manifest.missing), expected=expected)
    if twice(graph.name for graph in manifest.graphs) is not None:
        raise BundleError(f"{where}.graphs", received="one name twice", expected="every graph's own name")
    for i, graph in enumerate(manifest.graphs):
        _check_graph(graph, manifest, f"{where}.graphs[{i}]")
    golden = manifest.golden
    named = [golden.samples, golden.inputs, golden.outputs]
    named += [name for graph in manifest.graphs for name in graph.files]
    named += [name for name in (manifest.tokenizer, manifest.parity.report) if name is not None]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"{where}.files: {name!r} is used and not listed", todo=AGAIN)
    if manifest.tokenizer is not None and manifest.files[manifest.tokenizer].bytes > MAX_TOKENIZER_BYTES:
        expected = f"{MAX_TOKENIZER_BYTES:,} bytes at most"
        raise BundleError(f"{where}.files: the tokenizer is too large", expected=expected)


def _check_graph(graph: Graph, manifest: Manifest, where: str) -> None:
    """A graph reads what preprocessing makes, and says what the task and the routing promise."""
    promised: Tensors = {"logits": ("float32", ("batch", len(manifest.task.labels)))}
    if manifest.routing is not None:
        promised["routing"] = ("float32", ("batch", manifest.routing.layers, manifest.routing.experts))
    if graph.parts:
        _check_parts(graph, manifest, where)
    else:
        _check_tensors(graph.inputs, manifest.tensors, f"{where}.inputs")
    _check_tensors(graph.outputs, promised, f"{where}.outputs")
    missing = sorted(set(promised) - {tensor.name for tensor in graph.outputs})
    if missing:
        raise BundleError(f"{where}.outputs", received=f"no {missing[0]}", expected=", ".join(promised))


def _check_parts(graph: Graph, manifest: Manifest, where: str) -> None:
    """One part for each complementary modality, which reads that alone; the main file reads the rest and their rows."""
    modalities = tuple(part.modality for part in graph.parts)
    if modalities != manifest.complementary:
        expected = f"{', '.join(manifest.complementary)}, or none"
        raise BundleError(f"{where}.parts", received=", ".join(modalities), expected=expected)
    if graph.runs_on != "onnxruntime":
        raise BundleError(f"{where}.runs_on", received=graph.runs_on, expected="onnxruntime for a graph in parts")
    if twice([graph.file, *(part.file for part in graph.parts)]) is not None:
        raise BundleError(f"{where}.parts", received="one file twice", expected="a file of its own for each")
    read = manifest.tensors_of(manifest.main)
    for i, part in enumerate(graph.parts):
        at = f"{where}.parts[{i}]"
        _check_tensors(part.inputs, manifest.tensors_of(part.modality), f"{at}.inputs")
        widths = {spec.name: spec.shape[-1] for spec in part.outputs}
        names = (y_name(part.modality), conditions_name(part.modality))
        if tuple(spec.name for spec in part.outputs) != names:
            raise BundleError(f"{at}.outputs", received=", ".join(widths), expected=" and ".join(names))
        for spec in part.outputs:
            if spec.dtype != "float32" or [*map(type, spec.shape)] != [str, int] or spec.shape[0] != "batch":
                raise BundleError(f"{at}.outputs: {spec.name}", received=spec.form, expected="float32 (batch, a size)")
        read |= {names[1]: ("float32", ("batch", widths[names[1]]))}
    _check_tensors(graph.inputs, read, f"{where}.inputs")
    unread = sorted({conditions_name(name) for name in modalities} - {spec.name for spec in graph.inputs})
    if unread:
        raise BundleError(f"{where}.inputs", received=f"no {unread[0]}", expected=", ".join(read))


def _check_tensors(tensors: tuple[TensorSpec, ...], known: Tensors, where: str) -> None:
    if twice(tensor.name for tensor in tensors) is not None:
        raise BundleError(where, received="one name twice", expected="every name once")
    for tensor in tensors:
        if tensor.name not in known:
            raise BundleError(where, received=shown(tensor.name), expected=", ".join(known))
        expected = TensorSpec(tensor.name, *known[tensor.name]).form
        if tensor.form != expected:
            raise BundleError(f"{where}: {tensor.name}", received=tensor.form, expected=expected)
