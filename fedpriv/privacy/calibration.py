"""Calibration: from a budget to a noise multiplier, or to a number of rounds."""

from __future__ import annotations

from collections.abc import Callable

import dp_accounting
from scipy.optimize import brentq

from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.sampling import Adjacency

_TOLERANCE = 1e-6
# With more noise than this nothing is learnt, and rounding decides what is proved.
_MOST_NOISE = 2.0**30


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    rounds: int,
    adjacency: Adjacency,
    event_at: Callable[[float], dp_accounting.DpEvent],
) -> float:
    """Return the smallest noise multiplier (within 1e-6) with which `rounds` cost at most ε.

    Args:
        epsilon: the target ε, above 0.
        delta: δ, in (0, 1).
        rounds: the number of releases.
        adjacency: the adjacency of the events.
        event_at: the event of one release at a given noise multiplier.

    Raises:
        ValueError: no noise multiplier reaches the target.
    """

    def spent(noise_multiplier: float) -> float:
        accountant = RdpAccountant(adjacency)
        accountant.compose(event_at(noise_multiplier), rounds)
        return accountant.epsilon(delta)

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise ValueError(
                f"no noise multiplier reaches {epsilon:g} at δ = {delta:g}; write a larger one"
            )
    low = high / 2
    while spent(low) <= epsilon and low > _TOLERANCE:
        low /= 2
    if spent(low) <= epsilon:
        return low
    found = float(brentq(lambda z: spent(z) - epsilon, low, high, xtol=_TOLERANCE))
    # The search ends within its tolerance on either side of the target: step onto the safe one.
    while spent(found) > epsilon:
        found += _TOLERANCE
    return found


def affordable_rounds(
    event: dp_accounting.DpEvent,
    adjacency: Adjacency,
    epsilon: float,
    delta: float,
    at_most: int,
) -> int:
    """Return how many of `at_most` releases of `event` fit into (ε, δ), by bisection."""
    accountant = RdpAccountant(adjacency)
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if accountant.epsilon_after(event, delta, middle) <= epsilon:
            low = middle
        else:
            high = middle - 1
    return low
