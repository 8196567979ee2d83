"""Calibration: from a budget to a noise multiplier, or to a number of rounds."""

from __future__ import annotations

from collections.abc import Callable

import dp_accounting
from dp_accounting import rdp

from fedpriv.privacy.accounting import ORDERS, RdpAccountant
from fedpriv.privacy.sampling import Adjacency

_TOLERANCE = 1e-6


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

    try:
        found = dp_accounting.calibrate_dp_mechanism(
            lambda: rdp.RdpAccountant(ORDERS, adjacency.relation),
            lambda z: dp_accounting.SelfComposedDpEvent(event_at(z), rounds),
            epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0.0, 1.0),
            tol=_TOLERANCE,
        )
    except dp_accounting.mechanism_calibration.NoBracketIntervalFoundError:
        raise ValueError(f"no noise multiplier reaches ε = {epsilon:g} at δ = {delta:g}") from None
    noise_multiplier = float(found)
    # The search stops within its tolerance on either side of the target: step onto the safe one.
    while spent(noise_multiplier) > epsilon:
        noise_multiplier += _TOLERANCE
    return noise_multiplier


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
