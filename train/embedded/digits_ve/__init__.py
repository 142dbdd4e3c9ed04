"""digits-ve: visual entailment over real handwriting, generated from a seed (docs/digits-ve.md)."""

from train.embedded.digits_ve.generate import ensure_digits_ve

__all__ = ["ensure_digits_ve"]
