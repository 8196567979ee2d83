"""A small convolutional network with group normalisation, as a newcomer would write it."""

from torch import nn


def network(input_shape: tuple[int, ...], classes: int, width: int = 8) -> nn.Module:
    channels, side = input_shape[0], input_shape[-1]
    layers: list[nn.Module] = []
    for out in (width, 2 * width, 2 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels, side = out, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, classes))
