"""The Gaussian mechanism: the one place where noise is added to a sum of contributions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpriv.privacy.clipping import ClippingRule


@dataclass(frozen=True)
class GaussianMechanism:
    """Releases sum + N(0, (z·C)^2 I).

    Attributes:
        noise_multiplier: z, the standard deviation of the noise divided by the clip bound C.
        clipping: the rule that bounds each contribution; its bound is C.
    """

    noise_multiplier: float
    clipping: ClippingRule

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum: σ = z·C."""
        # Without noise the bound may be infinite, and 0·inf is not a number.
        return 0.0 if self.noise_multiplier == 0 else self.noise_multiplier * self.clipping.bound

    def release(self, total: Tensor, generator: np.random.Generator) -> Tensor:
        """Return the float64 vector `total` + N(0, σ²), drawn from `generator`.

        The noise is drawn once, here, at full strength, whoever dropped out of the sum. It is
        drawn in float64: the remaining floating-point gap (Mironov 2012) is stated in reports.
        """
        if self.stddev == 0:
            return total.clone()
        noise = torch.from_numpy(generator.standard_normal(total.numel()))
        return total + self.stddev * noise.to(total.device).view_as(total)
