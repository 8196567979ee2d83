"""Noise that is added to a node's sum before it leaves: the node's share, or its users' own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.training.cohort import CohortSum


def with_noise(summed: CohortSum, draws: Iterable[Tensor]) -> CohortSum:
    """Return a node's sum with noise: its share, or one draw for each of its users."""
    total = summed.total
    for noise in draws:
        total = GaussianMechanism.add(total, noise)
    return replace(summed, total=total)


def released_alone(summed: CohortSum, users: int = 0) -> CohortSum:
    """Return the noisy sum without what was seen on the way, which no noise covers.

    How far silos moved their bounds follows from noisy counts, and how many silos there are,
    `users`, is no secret: both go with it.
    """
    return CohortSum(
        total=summed.total,
        users=users,
        examples=0,
        skipped=0,
        non_finite=0,
        loss=0.0,
        norm=0.0,
        clipped=0,
        block_norms=[0.0] * len(summed.block_norms),
        block_clipped=[0] * len(summed.block_clipped),
        block_shares=[0.0] * len(summed.block_shares),
        block_sent=[0.0] * len(summed.block_sent),
        bound_moves=summed.bound_moves,
    )
