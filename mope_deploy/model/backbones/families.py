"""The one table that decides an encoder's family, and loading an encoder from a source.

A family is one file that wraps a library's encoder into the interface of :class:`Encoder`; only these files know timm
or transformers. Adding a family is that file and one line in :func:`families`.
"""

from __future__ import annotations

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Encoder, FrozenEncoder, LayeredEncoder
from mope_deploy.model.backbones.sources import LoadedEncoder, load_source
from mope_deploy.model.config import EncoderSpec
from mope_deploy.model.randomness import forked

__all__ = ["families", "load_encoder"]


def load_encoder(spec: EncoderSpec, *, main: bool = False) -> FrozenEncoder:
    """Load, wrap and freeze the encoder that ``spec`` names, one thread at a time.

    Args:
        spec: the encoder.
        main: whether it is to be the main encoder, whose layers are prompted.

    Raises:
        ConfigError: if the source does not exist, is no supported encoder, is of another modality than ``spec`` says,
            or has no layers to prompt where prompts are wanted.
    """
    # Libraries draw initial values before they load weights, and wrapping may run what is loaded; the caller's random
    # state is not theirs to move.
    with forked():
        loaded = load_source(spec.source)
        frozen = _family(loaded, spec, main=main).wrap(loaded, spec)
    frozen.backbone.requires_grad_(False).eval()
    return frozen


def _family(loaded: LoadedEncoder, spec: EncoderSpec, *, main: bool) -> type[Encoder]:
    """The family of a library's encoder, if it can be what ``spec`` says."""
    found = type(loaded.module).__name__
    family = next((family for family in families() if family.accepts(loaded.module)), None)
    if family is None:
        raise ConfigError(
            f"{spec.source} belongs to no supported encoder family",
            received=found,
            expected=" or ".join(family.family for family in families()),
        )
    if family.modality != spec.modality:
        raise ConfigError(
            f"{spec.source} is an encoder of another modality",
            received=f"modality {spec.modality!r}",
            expected=repr(family.modality),
        )
    if not issubclass(family, LayeredEncoder) and (main or spec.prompts):
        raise ConfigError(
            f"{spec.source} has no layers to prompt, so it can be a complementary encoder only, with prompts=0",
            received=found,
            expected=" or ".join(family.family for family in families() if issubclass(family, LayeredEncoder)),
        )
    return family


def families() -> tuple[type[Encoder], ...]:
    """Every family, in the order in which they are asked."""
    # Imported here: each family imports its library, and a text-only user should not wait for timm.
    from mope_deploy.model.backbones.beit import BeitEncoder
    from mope_deploy.model.backbones.bert import BertEncoder
    from mope_deploy.model.backbones.deberta import DebertaEncoder
    from mope_deploy.model.backbones.eva import EvaEncoder
    from mope_deploy.model.backbones.modernbert import ModernBertEncoder
    from mope_deploy.model.backbones.mpnet import MPNetEncoder
    from mope_deploy.model.backbones.pooled import PooledEncoder
    from mope_deploy.model.backbones.pooled_text import PooledTextEncoder
    from mope_deploy.model.backbones.pooled_vision import PooledVisionEncoder
    from mope_deploy.model.backbones.swin import SwinEncoder
    from mope_deploy.model.backbones.videomae import VideoMAEEncoder
    from mope_deploy.model.backbones.vit import ViTEncoder
    from mope_deploy.model.backbones.wav2vec2 import Wav2Vec2Encoder
    from mope_deploy.model.backbones.whisper import WhisperEncoder

    return (
        ViTEncoder,
        EvaEncoder,
        BeitEncoder,
        SwinEncoder,
        BertEncoder,
        DebertaEncoder,
        ModernBertEncoder,
        MPNetEncoder,
        Wav2Vec2Encoder,
        WhisperEncoder,
        VideoMAEEncoder,
        # Last: they take whatever no family before them runs layer by layer.
        PooledEncoder,
        PooledVisionEncoder,
        PooledTextEncoder,
    )
