"""What an export may be asked for, and the numbers that everyone in ``export/`` reads. It imports nothing of ours."""

from __future__ import annotations

__all__ = [
    "CALIBRATION_SAMPLES",
    "DEFAULT_OPSET",
    "EMBED_LIMIT",
    "FOLDS",
    "FORMATS",
    "GATE_SAMPLES",
    "GOLDEN_COUNT",
    "MAX_IR_VERSION",
    "METHODS",
    "MIN_JUDGED",
    "MIN_VALUES",
    "OPSETS",
    "REPAIR_MINUTES",
    "THRESHOLD_NAMES",
]

FORMATS = ("onnx", "trt", "triton")

OPSETS = range(17, 21)  # what the TensorRT parsers and ONNX Runtime 1.18 all read
DEFAULT_OPSET = 18
MAX_IR_VERSION = 10  # the newest that ONNX Runtime 1.18 (JetPack 6) reads
EMBED_LIMIT = 2_000_000_000  # bytes of weights that stay inside the file; protobuf ends at 2 GiB

# How prompts enter the layers (export.graph.folding): the cheapest of the others for each layer; known keys and values
# as constants but mixtures as tokens where they need a variance; that from products of experts, or from the mixture;
# nothing folded; prompts through the whole layers.
FOLDS = ("auto", "tables", "gram", "mixed", "none", "token")

METHODS = ("percentile", "entropy")  # how int8 cuts the outliers of an activation's range
CALIBRATION_SAMPLES = 128  # that int8 reads its ranges from

MIN_VALUES = 128  # that the parity gate compares of every output; a maximum over fewer says little about an error
# Rows for precisions below fp32: with fewer, one weighs more than the tenth of a per cent that fp16 may differ by.
GATE_SAMPLES = 1000
# Beneath that there is no verdict: if 16 agree, the share that does may still be as low as 83 % (95 % confidence).
MIN_JUDGED = 16
# Fields of export.gate.Thresholds.
THRESHOLD_NAMES = ("labels", "routing", "metric", "probability", "mean_probability", "logits")
REPAIR_MINUTES = 20.0  # that looking for what has to stay in fp32 may take, of each precision
GOLDEN_COUNT = 8  # samples that a bundle carries to check a device with
