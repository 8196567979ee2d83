"""A model from outside: a small convolutional network with group normalisation."""

from torch import nn


def cnn(input_shape: tuple[int, ...], classes: int, width: int = 8, groups: int = 2) -> nn.Module:
    """Return the network for images of `input_shape`."""
    channels, _, _ = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, padding=1),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
