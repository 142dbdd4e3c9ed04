"""Everything that can say no to an exported file, and what is compared with what.

==================  ================================  ===================================  ============================
the file            is compared with                  on                                   and must have
==================  ================================  ===================================  ============================
fp32, and fused     the trained model itself, eager   generated batches of awkward sizes,  names, dtypes and axes as
(``parity.py``)     in PyTorch, in token form: never  and real samples                     asked for; values within
                    the rewrite that was traced       (``cases.py``)                       1e-5, or float32's own
                    (``reference.py``)                                                     rounding; every label and top
                                                                                           expert equal but near-ties
every expert of     the trained experts, for forced   one row or more for each expert,     1e-5, or float32's own
these (``tables``)  scores                            selected by any sample or not        rounding
fp16, bf16, int8,   the same                          real samples alone                   shares of equal labels, of
int8-dynamic                                          (``evaluation.py``)                  equal top experts in every
(``measure.py``)                                                                           layer, a bounded drop of the
                                                                                           metric, bounded changes of
                                                                                           probabilities and of logits
                                                                                           (``thresholds.py``)
as packed           fp32: the model, as above; else   real samples that show every label   the same weights and nodes,
(``final.py``,      the file that was judged, also    and expert                           and values to the last bit,
export/final.py)    from the bytes as written                                              or the gate once more
in a bundle         the model again, both gates       other batches and samples, by seed   as above
(export/recheck.py)
==================  ================================  ===================================  ============================

Files run as a device runs them (``device.py``). What was found is ``parity_report.py``'s and ``lowered_report.py``'s.
Lower precision changes values. What has to survive is what users see and what MoPE is about: the predicted labels, the
task's metric, and in every layer the expert that counts most; and as labels hide what they were told by, probabilities
and logits within bounds that healthy models are far from.

A device compares its engine with golden samples (:mod:`mope_deploy.engines.golden`), not with a model.
"""

from export.gate.evaluation import Evaluation
from export.gate.final import Final, JudgedFile, changed, check_judged, hashes, near
from export.gate.found import require
from export.gate.lowered_report import (
    Flip,
    LogitsError,
    Metric,
    PrecisionReport,
    ProbabilityError,
    Share,
    require_precision,
)
from export.gate.measure import judge_again, measure_precision
from export.gate.parity import ParityGate
from export.gate.parity_report import ParityReport, require_parity
from export.gate.tables import TableCheck, compare_tables
from export.gate.thresholds import THRESHOLDS, Thresholds

__all__ = [
    "THRESHOLDS",
    "Evaluation",
    "Final",
    "Flip",
    "JudgedFile",
    "LogitsError",
    "Metric",
    "ParityGate",
    "ParityReport",
    "PrecisionReport",
    "ProbabilityError",
    "Share",
    "TableCheck",
    "Thresholds",
    "changed",
    "check_judged",
    "compare_tables",
    "hashes",
    "judge_again",
    "measure_precision",
    "near",
    "require",
    "require_parity",
    "require_precision",
]
