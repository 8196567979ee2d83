"""Distributed noise: every node adds a share, and the sum has the noise of the whole mechanism.

The setting is that of secure aggregation: somebody adds up the nodes' messages and sees nothing
but their sum (Dwork et al. 2006, "Our Data, Ourselves"; Kairouz, Liu, Steinke 2021). Independent
Gaussians add up to a Gaussian, so here nothing is lost against noise that is added centrally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedpriv.privacy.mechanisms import GaussianMechanism


@dataclass(frozen=True)
class NoiseShares:
    """Shares of variance σ²/(n - t): those of any n - t nodes together have at least σ².

    Attributes:
        nodes: n, the nodes that add a share each.
        lost: t, how many of them may fail to.

    Raises:
        ValueError: t is not from 0 to n - 1.
    """

    nodes: int
    lost: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lost < self.nodes:
            raise ValueError(
                f"lost_nodes must be below the number of nodes ({self.nodes}), got {self.lost}: "
                "the shares of those that are left are all the noise there is"
            )

    @property
    def needed(self) -> int:
        """n - t, the least number of shares whose sum may be released."""
        return self.nodes - self.lost

    def draw(
        self, mechanism: GaussianMechanism, sizes: Sequence[int], generator: np.random.Generator
    ) -> Tensor:
        """Return one node's share: float64 `[Σ sizes]`, N(0, σ²/(n - t)) on each coordinate.

        σ is that of `mechanism` on each block, of `sizes` coordinates.
        """
        return mechanism.noise(sizes, generator) / math.sqrt(self.needed)


def multiplier_against_a_node(multiplier: float, needed: int) -> float | None:
    """Return the noise multiplier of a sum against a node that takes off its own share.

    Of the n - t shares that are surely there n - t - 1 remain: z·√((n - t - 1)/(n - t)). None
    where that is no noise at all.
    """
    return multiplier * math.sqrt((needed - 1) / needed) if needed > 1 else None
