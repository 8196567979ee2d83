"""Positions of frames in time: sinusoids, and their augmentation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedpriv.models.stochastic import Stochastic

PositionKind = Literal["sinusoidal", "cape"]

LONGEST_PERIOD = 10_000.0

# CAPE, in units of tokens; the recipe's ranges for speech are seconds at 0.03 s a token.
GLOBAL_SHIFT = 30.0
LOCAL_SHIFT = 0.5
LARGEST_SCALE = 2.0


class Positions(Stochastic):
    """x + sinusoids of each token's place, fixed (Vaswani et al. 2017) or augmented (CAPE).

    `cape` (Likhomanenko et al. 2021) centres the places of an utterance at zero and in training
    moves them: all by one uniform shift, each by a small one of its own, and all by one
    log-uniform scale, so that the model learns distances and not places. Outside training only
    the centring remains. There are no parameters.
    """

    def __init__(self, kind: PositionKind) -> None:
        super().__init__()
        self.kind = kind

    @property
    def draws(self) -> bool:
        """Only where places are moved."""
        return self.kind == "cape"

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Add places to tokens `[B, T, dim]`, dim even, of which `lengths` `[B]` are real."""
        return x + self.table(lengths, *x.shape[1:]).to(x.dtype)

    def table(self, lengths: Tensor, tokens: int, dim: int) -> Tensor:
        """Return what is added to each token: `[B, tokens, dim]`."""
        places = torch.arange(tokens, device=lengths.device, dtype=torch.float32)
        if self.kind == "sinusoidal":
            return sinusoids(places, dim).expand(lengths.shape[0], -1, -1)
        centred = places - (lengths[:, None] - 1) / 2
        if self.training:
            centred = self._moved(centred)
        return sinusoids(centred, dim)

    def _moved(self, places: Tensor) -> Tensor:
        batch, tokens = places.shape
        draws = self.draw((batch, tokens + 2), places.device) * 2 - 1
        scale = torch.exp(draws[:, :1] * math.log(LARGEST_SCALE))
        return (places + draws[:, 1:2] * GLOBAL_SHIFT + draws[:, 2:] * LOCAL_SHIFT) * scale


def sinusoids(places: Tensor, dim: int) -> Tensor:
    """Return sin and cos of places `[..., T]` at dim/2 geometric periods: `[..., T, dim]`."""
    exponents = torch.arange(0, dim, 2, device=places.device, dtype=torch.float32) / dim
    angles = places[..., None] * LONGEST_PERIOD**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
