"""A model of your own, trained with privacy: any function that returns an nn.Module will do."""

from torch import nn

import fedpriv


def cnn(input_shape, classes, width: int = 8):
    """Convolutions, whose input and classes are facts that fedpriv hands over by name."""
    first = [nn.Conv2d(input_shape[0], width, 3), nn.GroupNorm(2, width), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


experiment = fedpriv.Experiment.load("configs/vit_digits.yaml", rounds=3)
run = experiment.with_(model={"name": cnn, "width": 16}).train(grid="local", run_dir="own-model")
print(run.epsilon(), run.quality, run.model())
