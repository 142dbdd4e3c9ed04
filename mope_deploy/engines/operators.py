"""The operators that an exported graph may hold: what the exporter writes, and all that is run on a device."""

from __future__ import annotations

__all__ = ["ALLOWED_OPS", "CONTRIB", "DYNAMIC_OPS", "FUSED_OPS"]

_ARITHMETIC = """Abs Add And Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin
    Softplus Sqrt Sub Tanh Where Xor"""
_LAYERS = """AveragePool BatchNormalization Conv Gemm GlobalAveragePool GroupNormalization InstanceNormalization
    LayerNormalization LogSoftmax MatMul MaxPool Softmax"""
_REDUCTIONS = (
    "ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
_SHAPES = """Cast Concat Constant ConstantOfShape DepthToSpace Expand Flatten Identity Pad Range Reshape Resize Shape
    Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze"""
_INDEXING = "Gather GatherElements GatherND OneHot ScatterElements ScatterND TopK"
_QUANTISATION = "DequantizeLinear QuantizeLinear"
# Of the standard domain, for every engine.
ALLOWED_OPS = frozenset(" ".join((_ARITHMETIC, _LAYERS, _REDUCTIONS, _SHAPES, _INDEXING, _QUANTISATION)).split())

# For ONNX Runtime alone: the standard ones of int8-dynamic, and its own that attention, normalisation, GELU and
# products are fused into. None runs a graph of its own, loads a library or reads a file.
DYNAMIC_OPS = frozenset(("DynamicQuantizeLinear", "MatMulInteger"))
CONTRIB = "com.microsoft"
_FUSED = """Attention BiasGelu FastGelu FusedMatMul Gelu GroupNorm GroupQueryAttention MultiHeadAttention QuickGelu
    RotaryEmbedding SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization
    SkipSimplifiedLayerNormalization"""
FUSED_OPS = frozenset(_FUSED.split())
