"""Layers that draw random numbers in training, each from a stream that can be exchanged.

By default they draw from torch's global generator. An engine that trains many users in one batch
sets `draw`, so that each user's numbers come from a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: Uniform numbers in [0, 1) of a shape `[B, ...]`, on a device.
Draw = Callable[[Sequence[int], torch.device], Tensor]


def draw_globally(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw from torch's global generator of the device."""
    return torch.rand(*shape, device=device)


class Stochastic(nn.Module):
    """A layer that draws: `draw(shape, device)` gives numbers, the batch first."""

    draw: Draw = staticmethod(draw_globally)


class Dropout(Stochastic):
    """Zero each number with probability p in training, and scale the others by 1/(1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def active(self) -> bool:
        """Whether numbers are dropped now."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` `[B, ...]` with numbers dropped."""
        if not self.active:
            return x
        return x * (self.draw(x.shape, x.device) >= self.p) / (1 - self.p)


class LayerDrop(Stochastic):
    """Each example skips a block with probability p in training (Fan et al. 2020)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return `after` `[B, T, dim]`, or `before` where the example skips the block."""
        if not self.training or self.p == 0:
            return after
        skip = self.draw((len(after), 1, 1), after.device) < self.p
        return torch.where(skip, before, after)
