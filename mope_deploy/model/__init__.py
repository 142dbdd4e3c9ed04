"""The MoPE model in PyTorch: one file per box of the paper's figure (see docs/architecture.md)."""

from mope_deploy.model.config import EncoderSpec, MoPEConfig
from mope_deploy.model.losses import importance_loss
from mope_deploy.model.mope import MoPE, MoPEOutput, build_model

__all__ = ["EncoderSpec", "MoPE", "MoPEConfig", "MoPEOutput", "build_model", "importance_loss"]
