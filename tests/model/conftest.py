"""Tiny encoders, made once a run."""

from tests.encoders import bert, vit

__all__ = ["bert", "vit"]
