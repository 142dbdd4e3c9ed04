"""From a static model to one ONNX file: torch's dynamo exporter with named dynamic axes, cleaned up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import convert_version
from torch import nn

from export.graph.exporter_config import MoPEExporterConfig
from export.graph.files import SMALL
from export.graph.naming import name_after_modules
from export.graph.static import StaticMoPE
from export.limits import DEFAULT_OPSET, MAX_IR_VERSION
from export.options import check_opset
from mope_deploy.errors import ExportError
from mope_deploy.model.quiet import quiet

__all__ = ["drop_routing", "to_older", "trace"]


def trace(static: StaticMoPE, config: MoPEExporterConfig, *, opset: int = DEFAULT_OPSET) -> ir.Model:
    """Trace a static model into a graph that every target takes.

    The pooled feature of a complementary modality is called ``y_<modality>`` in it: export.graph.split finds it so.

    Args:
        static: from :func:`export.graph.static.to_static`; its weights are referenced, not copied.
        config: describes inputs, axes and outputs.
        opset: version of the standard operators, 17 to 20.

    Raises:
        UsageError: an opset outside that range.
        ExportError: the exporter failed, or the graph holds something that a target cannot take.
    """
    check_opset(opset)
    names, outputs = list(config.inputs), list(config.outputs)
    shown, pooled = (static.showing_y(), static.y_names) if isinstance(static, StaticMoPE) else (static, ())
    examples = config.generate_dummy_inputs(framework="pt")
    try:
        with quiet(), torch.no_grad():  # it tells of axes that share a name
            program = torch.onnx.export(
                shown,
                kwargs={"inputs": examples},
                dynamo=True,
                input_names=names,
                output_names=[*outputs, *pooled],
                dynamic_shapes={"inputs": config.inputs},
                opset_version=max(opset, DEFAULT_OPSET),
                verbose=False,
            )
            model = program.model  # type: ignore[union-attr]
            name_after_modules(model, static)
            _share_constants(model, static)
            if opset < DEFAULT_OPSET:  # the exporter writes 18 at least; converting it later keeps the names
                to_older(model, opset)
            _keep_outputs(model, model.graph.outputs[: len(outputs)])
    except Exception as error:  # the exporter raises many classes, all meaning that it cannot
        reason = " ".join(str(error.__cause__ or error).split())
        raise ExportError(
            f"torch's exporter failed: {type(error.__cause__ or error).__name__}: {reason[:300]}"
        ) from error
    if model.opset_imports.get("") != opset:
        raise ExportError("the graph's opset", received=model.opset_imports.get(""), expected=opset)
    model.graph.name = "mope"
    model.ir_version = min(model.ir_version or MAX_IR_VERSION, MAX_IR_VERSION)
    model.producer_name, model.producer_version = "mope-deploy", version("mope-deploy")
    _check_interface(model, config)
    return model


def to_older(model: ir.Model, opset: int) -> None:
    """Convert a graph of opset 18 to an older one, in place.

    The converter leaves attributes standing that the older operators do not have. ``noop_with_empty_axes`` says nothing
    where there are axes.
    """
    convert_version(model, target_version=opset, fallback=True)
    for node in model.graph:
        known = onnx.defs.get_schema(node.op_type, opset, node.domain).attributes
        if "noop_with_empty_axes" in node.attributes and "noop_with_empty_axes" not in known:
            assert "axes" in node.attributes or len(node.inputs) > 1
            del node.attributes["noop_with_empty_axes"]


def drop_routing(model: ir.Model) -> None:
    """Take the output ``routing`` away, and what computes nothing else, in place."""
    _keep_outputs(model, [value for value in model.graph.outputs if value.name != "routing"])


def _keep_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    outputs = list(outputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)


def _share_constants(model: ir.Model, module: nn.Module) -> None:
    """Let one constant stand for all equal ones, in place; parameters keep their names.

    Swin's blocks each bring their window's mask and places, which are the same throughout a stage.
    """
    parameters = {name for name, _ in module.named_parameters()}
    seen: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALL or name.removesuffix(".T") in parameters:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest())
        first = seen.setdefault(key, value)
        if first is not value and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]


def _check_interface(model: ir.Model, config: MoPEExporterConfig) -> None:
    """What the exporter made of names and axes is what was asked for: it renames or fixes an axis without an error."""
    for what, values, wanted in (
        ("inputs", model.graph.inputs, config.inputs),
        ("outputs", model.graph.outputs, config.outputs),
    ):
        if [value.name for value in values] != list(wanted):
            raise ExportError(f"the graph's {what}", received=[value.name for value in values], expected=list(wanted))
        for value in values:
            shape = [] if value.shape is None else [str(size) for size in value.shape]
            found = {axis: size for axis, size in enumerate(shape) if not size.isdigit()}
            if found != wanted[value.name or ""]:
                raise ExportError(f"dynamic axes of {value.name}", received=found, expected=wanted[value.name or ""])
