"""HideNseek (Vallapuram et al. 2022, "HideNseek: federated lottery ticket via server-side ...").

    server, once:  w ← θ₀ of whose weights the smallest are 0; V ← w
    user k:        s ← x;  K times:  s ← s - η∇loss(|w|·sign(s));  send x - |w|·sign(s)
    server:        V ← optimizer(V, mean of what was sent);  x ← |w|·sign(V)

Only signs are trained; the magnitudes |w| stay as they began. A weight votes with how large it is:
s and V begin at the weights themselves, and a step goes past sign (a straight-through gradient).
What a user sends is its mask's difference to the one that it was given, in weights: at most 2‖w‖
long, and clipped like any update. With plain steps of rate 1, and nothing remembered, x would be
the majority of the masks; V remembers, since noise would decide most signs of a single round.

The paper prunes by synaptic saliency, |θ·∂R/∂θ|, which is that of whole paths in nets that are
linear between their units. Through attention and layer norms there are no such paths: R here is
that of each layer alone, Σ|θ|, by which a weight's saliency is its magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm

_DENSITY = Field(
    gt=0, le=1, description="Share of each weight matrix that is kept, the largest; the rest is 0"
)


@dataclass(frozen=True)
class HideNseek(Algorithm):
    """Users learn the signs of weights whose magnitudes stay as they began, most of them pruned.

    Attributes:
        density: the share of each weight matrix that is kept, the largest; the rest stays 0.
    """

    density: Annotated[float, _DENSITY] = 0.5
    cite = "HideNseek (Vallapuram et al. 2022)"
    signs = True

    def begun(self, block: Tensor) -> Tensor:
        """Return a matrix without its smallest weights; biases and gains as they are."""
        if block.dim() < 2:
            return block
        kept = max(1, round(self.density * block.numel()))
        magnitudes = block.abs().flatten()
        mask = torch.zeros_like(magnitudes, dtype=torch.bool)
        # Of equal weights the first are kept, on every device.
        mask[magnitudes.argsort(descending=True, stable=True)[:kept]] = True
        return torch.where(mask.view_as(block), block, 0.0)
