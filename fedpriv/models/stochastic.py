"""Layers that draw random numbers in training, each from a stream that can be exchanged.

By default they draw from torch's global generator. An engine that trains many users in one batch
sets `draw`, so that each user's numbers come from a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

#: Uniform numbers in [0, 1) of a shape `[B, ...]`, on a device.
Draw = Callable[[Sequence[int], torch.device], Tensor]


def draw_globally(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw from torch's global generator of the device."""
    return torch.rand(*shape, device=device)


@dataclass(frozen=True)
class PerUserDraw:
    """Draws each user's rows, equally many a user, from the user's own generator.

    What a user gets depends on its generator and on how often it has drawn. It does not depend on
    how many rows are added to its own, nor on how long its rows are padded to be, for that is up to
    the other users who train with it. On a GPU it would: a user's rows are drawn there at once, by
    generators whose numbers depend on how many are drawn. So users do not share a stack there.
    """

    generators: Sequence[torch.Generator]

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return uniform numbers of `shape`: `[U·B, ...]`."""
        rows, row_shape = shape[0] // len(self.generators), tuple(shape[1:])
        if device.type != "cpu":
            at_once = (rows, *row_shape)
            return torch.cat(
                [torch.rand(at_once, generator=g, device=device) for g in self.generators]
            )
        own = torch.Generator()
        drawn = []
        for generator in self.generators:
            first = int(torch.randint(2**62, (), generator=generator))
            drawn += [_row(row_shape, own.manual_seed(first + row)) for row in range(rows)]
        return torch.stack(drawn)


def _row(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw one row; a longer one, `[T, ...]` or `[heads, T, T]`, begins with the shorter one."""
    if len(shape) < 3:
        return torch.rand(shape, generator=generator)
    heads, tokens, _ = shape
    numbers = torch.rand(tokens**2, heads, generator=generator)
    return numbers[_shells(tokens)].permute(2, 0, 1)


@lru_cache(maxsize=64)
def _shells(tokens: int) -> Tensor:
    """Number the places of a square so that each smaller square comes first: int64 `[T, T]`."""
    place = torch.arange(tokens)
    row, column = place[:, None], place[None, :]
    shell = torch.maximum(row, column)
    return shell**2 + torch.where(row >= column, column, shell + 1 + row)


class Stochastic(nn.Module):
    """A layer that draws: `draw(shape, device)` gives numbers, the batch first."""

    draw: Draw = staticmethod(draw_globally)

    @property
    def draws(self) -> bool:
        """Whether it draws at all in training."""
        return True


class Dropout(Stochastic):
    """Zero each number with probability p in training, and scale the others by 1/(1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def draws(self) -> bool:
        """Not where numbers are dropped with probability 0."""
        return self.p > 0

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

    @property
    def draws(self) -> bool:
        """Not where blocks are skipped with probability 0."""
        return self.p > 0

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return `after` `[B, T, dim]`, or `before` where the example skips the block."""
        if not self.training or self.p == 0:
            return after
        skip = self.draw((len(after), 1, 1), after.device) < self.p
        return torch.where(skip, before, after)
