"""Models and a task of somebody's own in which examples of a batch meet."""

from dataclasses import dataclass

import torch
from torch import nn

from fedpriv.tasks.classification import Classification


class Two(nn.Module):
    """Two layers, and something in between."""

    stackable = True

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(64, 8), between, nn.Linear(8, 10)

    def forward(self, inputs):
        return self.last(torch.relu(self.between(self.first(inputs.flatten(1)))))


class Centred(nn.Module):
    def forward(self, hidden):
        return hidden - hidden.mean(0)


class Remembering(nn.Module):
    seen = 0.0

    def forward(self, hidden):
        shifted, self.seen = hidden - self.seen, hidden.detach().mean()
        return shifted


def plain():
    return Two(nn.Identity())


def centred():
    return Two(Centred())


def batch_norm():
    return Two(nn.BatchNorm1d(8, affine=False, track_running_stats=False))


def dropout():
    return Two(nn.Dropout(0.5))


def remembering():
    return Two(Remembering())


def zero_head():
    model = centred()
    nn.init.zeros_(model.last.weight)
    return model


@dataclass(frozen=True)
class Relative(Classification):
    """How much worse an example is than the batch."""

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return losses / losses.mean()


@dataclass(frozen=True)
class Mean(Classification):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


def relative():
    return Relative()


def mean():
    return Mean()
