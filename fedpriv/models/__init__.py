"""The models that users train: one transformer block, and what is built of it."""

from fedpriv.models.initialise import initialise
from fedpriv.models.registry import MODELS, ModelConfig, build_model
from fedpriv.models.speech import SpeechTransformer
from fedpriv.models.transformer import Attention, Block, Transformer
from fedpriv.models.vit import LearnedPositions, ViT

__all__ = [
    "MODELS",
    "Attention",
    "Block",
    "LearnedPositions",
    "ModelConfig",
    "SpeechTransformer",
    "Transformer",
    "ViT",
    "build_model",
    "initialise",
]
