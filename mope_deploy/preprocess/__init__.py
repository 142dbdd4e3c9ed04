"""Raw inputs → named arrays: the same code in training, in the export gate and on the device.

One file a modality; :class:`Preprocessing` is all that a model reads together.
"""

from mope_deploy.preprocess.audio import AudioSource, AudioSpec, Waveform
from mope_deploy.preprocess.collection import MODALITIES, Preprocessing, Specs, present_name, tensors_of
from mope_deploy.preprocess.image import ImageSource, ImageSpec
from mope_deploy.preprocess.shared import Tensors
from mope_deploy.preprocess.text import TextSpec, check_text
from mope_deploy.preprocess.video import VideoSource, VideoSpec

__all__ = [
    "MODALITIES",
    "AudioSource",
    "AudioSpec",
    "ImageSource",
    "ImageSpec",
    "Preprocessing",
    "Specs",
    "Tensors",
    "TextSpec",
    "VideoSource",
    "VideoSpec",
    "Waveform",
    "check_text",
    "present_name",
    "tensors_of",
]
