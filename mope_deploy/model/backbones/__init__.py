"""Frozen encoders of every family behind one interface."""

from mope_deploy.model.backbones.base import Encoder, Form, FrozenEncoder, LayeredEncoder
from mope_deploy.model.backbones.families import families, load_encoder

__all__ = ["Encoder", "Form", "FrozenEncoder", "LayeredEncoder", "families", "load_encoder"]
