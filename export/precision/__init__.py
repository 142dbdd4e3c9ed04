"""Lowering: a canonical fp32 graph written again at another precision, with what must stay exact left in fp32.

``half.py`` (fp16, bf16), ``int8.py`` and ``dynamic.py`` each implement the protocol of ``lower.py``; ``check.py`` reads
every file written back and refuses one that is not what was asked for; ``repair.py`` finds what has to stay in fp32.
"""

from export.precision.lower import Lowering, lowering

__all__ = ["Lowering", "lowering"]
