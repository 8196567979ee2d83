"""What is released beside the updates where clip bounds adapt, and where the bounds then go."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedpriv.federation.plan import Plan
from fedpriv.privacy.clipping import moved
from fedpriv.training.cohort import CohortSum


def clip_counts(summed: CohortSum, bounds: tuple[float, ...]) -> Tensor:
    """Return what a node's sum has beside updates where bounds adapt: float64 `[bounds]`.

    It is Σ(b - 1/2) over its users, b = 1 within the bound: each adds ±1/2 to each count, or 0
    where its update was not finite. Of silos it is by how much their own bounds have moved.
    """
    if not bounds:
        return torch.zeros(0, dtype=torch.float64)
    if summed.bound_moves:
        return torch.tensor(summed.bound_moves, dtype=torch.float64)
    finite = summed.users - summed.non_finite
    above = summed.block_clipped if len(bounds) > 1 else [summed.clipped]
    return finite / 2 - torch.tensor(above, dtype=torch.float64)


def next_bounds(
    plan: Plan, bounds: tuple[float, ...], counts: Tensor, sums: Iterable[CohortSum]
) -> tuple[float, ...]:
    """Return the bounds of the next round, a function of the `counts` that were released."""
    if plan.adaptive is None:
        return bounds
    if not plan.mechanism.in_sums:
        within = counts / plan.sampling.expected_cohort + 0.5
        return plan.adaptive.next(bounds, within.tolist())
    # Who answered is no secret of silos: the geometric mean over them.
    silos = sum(summed.users for summed in sums)
    return moved(bounds, (counts / max(silos, 1)).tolist())
