"""What each kind of device can take: ``--target cpu|rtx|server|orin-nano|orin-nx|orin-agx|thor``.

A preset says which precisions, opsets and operators the library on that device has, and which sizes and scratch memory
to build with there. ``mope-export --target`` checks a graph against it before the graph leaves for the device.

Where the figures come from (none of these devices was at hand):

- TensorRT 10.0's parser reads opsets 9 to 20, that of 10.15 opsets 9 to 24 (docs/operators.md of onnx-tensorrt at those
  releases). Its changelog moves ONNX to 1.17, whose opset is 22, in 10.6; nothing between 10.0 and 10.3 changes it.
- Operators: the same table of 10.15, less what its changelog adds after 10.3: Attention in 10.14; RMSNormalization,
  RotaryEmbedding and TensorScatter in 10.15.
- FP8 needs compute capability 8.9, FP4 10.0, BF16 and TF32 8.0 (NVIDIA's support matrices).
- TensorRT-RTX 1.7.1: its parser and builder, run without a GPU (tests/engines/test_targets.py).
- ONNX Runtime 1.18, the oldest supported, reads opset 21.
- Workspaces and batches are our choices, from the memory that the boards have. Not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from mope_deploy.errors import ExportError, UsageError
from mope_deploy.fields import did_you_mean
from mope_deploy.manifest import PRECISIONS

__all__ = ["TARGETS", "Target", "get_target"]

_MORE_PRECISIONS = ("tf32", "fp8", "int4", "fp4")  # known, so that a device's lack of them can be named

_TENSORRT = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Elu
    Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
    LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor"""
_TENSORRT_OPS = frozenset(_TENSORRT.split())
_NO_TENSORRT = {
    "DynamicQuantizeLinear": "TensorRT does not take ONNX's dynamic quantisation: use --precision int8",
    "MatMulInteger": "TensorRT does not take ONNX's integer products: use --precision int8, which writes Q/DQ pairs",
    "NonZero": "its shape depends on data, and engines are planned for shapes: use TopK with a constant k, or a mask",
    "Einsum": "before 10.12 the parser takes few of its equations: write MatMul and Transpose",
}
_NO_TENSORRT_10_12 = {op: reason for op, reason in _NO_TENSORRT.items() if op != "Einsum"}
_LATER = "decompose it: --opset 18 does"
_OPSET_23 = {
    "Attention": f"an operator of opset 23, in TensorRT from 10.14 on: {_LATER}",
    "RMSNormalization": f"an operator of opset 23, in TensorRT from 10.15 on: {_LATER}",
    "RotaryEmbedding": f"an operator of opset 23, in TensorRT from 10.15 on: {_LATER}",
}
_NO_DYNAMIC = {"int8-dynamic": "TensorRT quantises with scales that are in the file: use int8, which calibrates them"}


@dataclass(frozen=True)
class Target:
    """One kind of device; by default one with TensorRT.

    Attributes:
        name: what ``--target`` takes.
        description: the device.
        runs: the library on it, with its version.
        precisions: those of :data:`mope_deploy.manifest.PRECISIONS` that it runs.
        default_precisions: what is exported for it unless ``--precision`` says otherwise.
        batch: ``min:opt:max`` that its engine is built for by default.
        text_length: ``min:opt:max`` in tokens; None for the bundle's own limits.
        workspace: most scratch memory of the builder on the GPU, MiB; None for the library's own limit.
        opset: default.
        opsets: those that its parser reads, from 17 on: LayerNormalization is no operator before.
        compute_capabilities: of its GPU; none for a CPU.
        ops: operators of the standard domain that its parser takes; None for all that the opset has.
        refused: operator → why it is not taken, and what to do.
        lacks: precision → why it is not there, and what to do.
        own_ops: whether it takes ONNX Runtime's own operators, as fused graphs hold them.
    """

    name: str
    description: str
    _: KW_ONLY
    runs: str
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    default_precisions: tuple[str, ...] = ("fp16",)
    batch: str
    text_length: str | None = None
    workspace: int | None = None
    opset: int = 18
    opsets: range
    compute_capabilities: tuple[str, ...] = ()
    ops: frozenset[str] | None = _TENSORRT_OPS
    refused: Mapping[str, str] = field(default_factory=lambda: {**_NO_TENSORRT, **_OPSET_23})
    lacks: Mapping[str, str] = field(default_factory=lambda: _NO_DYNAMIC)
    own_ops: bool = False

    def check(self, *, opset: int, precisions: Sequence[str], ops: Collection[str] = ()) -> None:
        """Raise unless the device takes such graphs.

        Args:
            opset: of the standard operators.
            precisions: of graphs.
            ops: types of the graphs' nodes; one outside the standard domain with it: ``"com.microsoft.Attention"``.

        Raises:
            UsageError: an opset or a precision that the device does not have; they were asked for.
            ExportError: an operator that it does not have; the message names the first three.
        """
        self.check_precisions(precisions)
        if opset not in self.opsets:
            raise UsageError(
                f"the opset for --target {self.name}",
                received=opset,
                expected=f"{self.opsets.start} to {self.opsets.stop - 1}, which {self.runs} reads",
                todo=f"leave --opset out for {self.opset}",
            )
        found = [f"{op}: {reason}" for op in sorted(set(ops)) if (reason := self._against(op)) is not None]
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ExportError(f"--target {self.name} ({self.runs}) does not take {'; '.join(found[:3])}{more}")

    def check_precisions(self, precisions: Sequence[str]) -> None:
        """Raise :class:`UsageError` unless the device has all of them; the message says why where that is known."""
        for precision in precisions:
            if precision not in self.precisions:
                known = precision in (*PRECISIONS, *_MORE_PRECISIONS)
                unwritten = f"mope-export writes no {precision}"
                raise UsageError(
                    f"the precision for --target {self.name}",
                    received=precision,
                    expected=f"one of {', '.join(self.precisions)}",
                    todo=self.lacks.get(precision, unwritten) if known else did_you_mean(precision, PRECISIONS),
                )

    def _against(self, op: str) -> str | None:
        """Why an operator is not taken; None if it is."""
        if "." in op:
            own = op.startswith("com.microsoft.")
            return None if own and self.own_ops else "no standard operator: export without --fuse for this device"
        if op in self.refused:
            return self.refused[op]
        if self.ops is None or op in self.ops:
            return None
        return "not among the operators of its parser: express it by others"


_ON_ORIN = "the GPU of an Orin has compute capability 8.7 and {}: use fp16 or int8"
_ORIN: dict[str, Any] = {
    "runs": "TensorRT 10.3 (JetPack 6) or later",  # what that takes, the 10.16 of JetPack 7.2 takes too
    "opsets": range(17, 21),
    "compute_capabilities": ("8.7",),
    "lacks": {**_NO_DYNAMIC, "fp8": _ON_ORIN.format("FP8 needs 8.9"), "fp4": _ON_ORIN.format("FP4 needs 10.0")},
}
_ALL = (
    Target(
        "cpu",
        "laptops, servers and boards without a GPU that is used",
        batch="1:1:16",
        runs="ONNX Runtime 1.18 or later, on the CPU",
        opsets=range(17, 22),
        precisions=("fp32", "fp16", "int8", "int8-dynamic"),
        default_precisions=("fp32", "int8-dynamic"),
        ops=None,
        refused=dict.fromkeys(_OPSET_23, f"an operator of opset 23, which ONNX Runtime 1.18 does not have: {_LATER}"),
        lacks={
            "bf16": "ONNX Runtime has no bfloat16 MatMul, Add or Softmax on a CPU: use fp32 or int8-dynamic",
            "fp8": "ONNX Runtime computes no FP8 on a CPU: use int8 or int8-dynamic",
            "fp4": "ONNX Runtime computes no FP4 on a CPU: use int8 or int8-dynamic",
        },
        own_ops=True,
    ),
    Target(
        "rtx",
        "GeForce and professional RTX cards, Turing apart",
        batch="1:4:16",
        runs="TensorRT-RTX 1.7",
        opsets=range(17, 24),
        compute_capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"),
        ops=_TENSORRT_OPS | {"Einsum", "RMSNormalization"},
        refused={**_NO_TENSORRT_10_12, "Attention": f"it parses and then fails to build there: {_LATER}"},
    ),
    Target(
        "server",
        "data-centre GPUs: A100, A10, L4, L40S, H100, H200, B200",
        batch="1:8:32",
        runs="TensorRT 10.3 or later",
        opsets=range(17, 21),
        compute_capabilities=("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
    ),
    Target("orin-nano", "Jetson Orin Nano, 4 or 8 GB shared by CPU and GPU", batch="1:1:4", workspace=512, **_ORIN),
    Target("orin-nx", "Jetson Orin NX, 8 or 16 GB shared by CPU and GPU", batch="1:1:8", workspace=1024, **_ORIN),
    Target("orin-agx", "Jetson AGX Orin, 32 or 64 GB shared by CPU and GPU", batch="1:4:16", workspace=4096, **_ORIN),
    Target(
        "thor",
        "Jetson AGX Thor, 128 GB shared by CPU and GPU",
        batch="1:4:16",
        runs="TensorRT 10.13 (JetPack 7.0) or later",
        opsets=range(17, 23),
        workspace=8192,
        compute_capabilities=("11.0",),
        ops=_TENSORRT_OPS | {"Einsum"},
        refused={**_NO_TENSORRT_10_12, **_OPSET_23},
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def get_target(name: str) -> Target:
    """The preset of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        expected = f"one of {', '.join(TARGETS)}"
        raise UsageError("--target", received=repr(name), expected=expected, todo=did_you_mean(name, TARGETS))
    return TARGETS[name]
