"""The models that users train: one transformer block, and what is built of it."""

from fedpriv.models.initialise import initialise
from fedpriv.models.options import ModelOptions
from fedpriv.models.registry import MODELS, build_model
from fedpriv.models.speech import SpeechOptions, SpeechTransformer
from fedpriv.models.transformer import Attention, Block, Transformer
from fedpriv.models.vit import LearnedPositions, ViT, ViTOptions

__all__ = [
    "MODELS",
    "Attention",
    "Block",
    "LearnedPositions",
    "ModelOptions",
    "SpeechOptions",
    "SpeechTransformer",
    "Transformer",
    "ViT",
    "ViTOptions",
    "build_model",
    "initialise",
]
