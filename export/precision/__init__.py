"""Lowering: a canonical fp32 graph written again at another precision, with what must stay exact left in fp32.

``half.py`` (fp16, bf16), ``int8.py`` and ``dynamic.py`` each implement :class:`Lowering`; ``check.py`` reads every file
written back and refuses one that is not what was asked for.
"""

from export.precision.lower import Lowering, lowering

__all__ = ["Lowering", "lowering"]
