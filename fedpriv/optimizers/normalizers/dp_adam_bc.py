"""DP-AdamBC (Tang et al. 2024, "DP-AdamBC: your DP-Adam is actually DP-SGD").

    m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  Δ = m̂ / √max(v̂ - Φ, γ')

m̂ and v̂ are divided by 1 - βᵗ, as in Adam. Φ is the variance of the noise on each number of the
averaged update, which is public: the paper's (σC/B)², here of this round's bounds, block by block.
Where it changes from round to round Φ is averaged as v is. With `server: {optimizer: sgd}` the step
is lr·Δ; without noise it is Adam's, with γ' for its ε.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

Decay = Annotated[float, Field(ge=0, lt=1)]


class DpAdamBc:
    """Adam's direction, with the noise's variance taken out of its second moment."""

    cite = "DP-AdamBC (Tang et al. 2024)"
    knows_noise = True

    def __init__(
        self,
        beta1: Decay = 0.9,
        beta2: Decay = 0.999,
        floor: Annotated[float, Field(gt=0)] = 1e-8,
    ) -> None:
        """Keep nothing yet; `floor` is γ'."""
        self.beta1, self.beta2, self.floor = beta1, beta2, floor
        self.calls = 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.variance: dict[str, float] = {}

    def __call__(self, update: dict[str, Tensor], noise: dict[str, float]) -> dict[str, Tensor]:
        """Return Δ of each block; `noise` are the standard deviations of the noise on them."""
        self.calls += 1
        return {name: self._direction(name, block, noise[name]) for name, block in update.items()}

    def _direction(self, name: str, block: Tensor, noise: float) -> Tensor:
        g, b1, b2 = block.double(), self.beta1, self.beta2
        first = b1 * self.first.get(name, torch.zeros_like(g)) + (1 - b1) * g
        second = b2 * self.second.get(name, torch.zeros_like(g)) + (1 - b2) * g.square()
        variance = b2 * self.variance.get(name, 0.0) + (1 - b2) * noise**2
        self.first[name], self.second[name], self.variance[name] = first, second, variance
        signal = (second - variance) / (1 - b2**self.calls)
        direction = first / (1 - b1**self.calls) / signal.clamp(min=self.floor).sqrt()
        return direction.to(block.dtype)
