"""The routing-aware gate for files of lower precision: against the untouched eager float32 model, on real samples.

Lower precision changes values, so values alone decide nothing here. What has to survive is what users see and what
MoPE is about: the predicted labels, the task's metric, and in every layer the expert that counts most.
"""

from export.gate.evaluation import Evaluation
from export.gate.lowered_report import Flip, LogitsError, Metric, PrecisionReport, Share, require_precision
from export.gate.measure import measure_precision
from export.gate.thresholds import THRESHOLDS, Thresholds

__all__ = [
    "THRESHOLDS",
    "Evaluation",
    "Flip",
    "LogitsError",
    "Metric",
    "PrecisionReport",
    "Share",
    "Thresholds",
    "measure_precision",
    "require_precision",
]
