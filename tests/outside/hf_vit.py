"""A model from outside: Hugging Face's vision transformer, small, with random weights."""

from torch import nn
from transformers import ViTConfig, ViTForImageClassification


def vit(input_shape: tuple[int, ...], classes: int, width: int = 16, depth: int = 1) -> nn.Module:
    """Return the transformer for images of `input_shape`, in patches of 4 x 4."""
    channels, side, _ = input_shape
    config = ViTConfig(
        image_size=side,
        patch_size=4,
        num_channels=channels,
        num_labels=classes,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=2,
    )
    return ViTForImageClassification(config)
