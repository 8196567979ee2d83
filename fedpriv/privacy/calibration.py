"""Calibration: from a budget to a noise multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from functools import cache, lru_cache, partial

import dp_accounting
from scipy.optimize import brentq

from fedpriv.privacy.accounting import (
    INTERVAL,
    ORDERS,
    PLD_UP_TO,
    Accountant,
    PldAccountant,
    RdpAccountant,
)
from fedpriv.privacy.charging import ALL_ACCOUNTANTS, charge
from fedpriv.privacy.sampling import Adjacency

_TOLERANCE = 1e-6
# Below this ε is zero to every reader; a logarithm of zero there is not.
_LEAST = 1e-12
# As near as RDP need come where PLD is asked after it.
_NEAR = 1e-2
# PLD is asked by a grid of losses that is as coarse first, in a tenth of the time.
_ROUGH_INTERVAL = 10 * INTERVAL
_WHOLE_ORDERS = tuple(order for order in ORDERS if order == int(order))
# With more noise than this nothing is learnt, and rounding decides what is proved.
_MOST_NOISE = 2.0**30
# A ledger rounds the multiplier that it charges down, by less than this.
_RECORDED = 1 - 1e-11
# PLD is asked for z of so many digits: it has no more, on every machine.
_DIGITS = Context(prec=7, rounding=ROUND_CEILING)


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    rounds: int,
    adjacency: Adjacency,
    event_at: Callable[[float], dp_accounting.DpEvent],
    accountants: Sequence[str] = ALL_ACCOUNTANTS,
) -> float:
    """Return the smallest noise multiplier (within 1e-6) with which `rounds` cost at most ε.

        >>> from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
        >>> sampling, clipping = PoissonSampling(1000, 50), GlobalClipping(0.1)
        >>> z = noise_multiplier_for(
        ...     2.0, 1e-5, 100, Adjacency.ADD_OR_REMOVE_ONE,
        ...     lambda z: sampling.event(GaussianMechanism(z, clipping)),
        ... )
        >>> round(z, 4)
        1.3445

    Args:
        epsilon: the target ε, above 0, held against the smallest that has a proof.
        delta: δ, in (0, 1).
        rounds: the number of releases.
        adjacency: the adjacency of the events.
        event_at: the event of one release at a given noise multiplier.
        accountants: which may be asked, by name.

    Raises:
        ValueError: no noise multiplier reaches the target.
    """
    events = _Events(event_at, event_at(1.0), event_at(2.0))
    return _calibrated(epsilon, delta, rounds, adjacency, events, tuple(accountants))


@dataclass(frozen=True)
class _Events:
    """The event of a release by its noise multiplier, known by what it is at two of them."""

    at: Callable[[float], dp_accounting.DpEvent] = field(compare=False)
    at_one: dp_accounting.DpEvent
    at_two: dp_accounting.DpEvent


@lru_cache(maxsize=64)  # a sweep asks the same of every run, which takes seconds by PLD
def _calibrated(
    epsilon: float,
    delta: float,
    rounds: int,
    adjacency: Adjacency,
    events: _Events,
    accountants: tuple[str, ...],
) -> float:
    event_at = events.at

    def spent(accountant: Accountant, noise_multiplier: float) -> float:
        accountant.compose(event_at(noise_multiplier * _RECORDED), rounds)
        return accountant.epsilon(delta)

    def by_rdp(
        tolerance: float, orders: tuple[float, ...] = ORDERS, epsilon: float = epsilon
    ) -> float:
        of = partial(RdpAccountant, adjacency, orders)
        return _smallest(lambda z: spent(of(), z), epsilon, delta, tolerance)

    if "pld" in accountants:
        # Fewer orders prove less, in a tenth of the time.
        start = by_rdp(_NEAR, _WHOLE_ORDERS)
        event = event_at(start * _RECORDED)
        if charge({event: rounds}, adjacency, [delta], accountants).first.accountant == "pld":
            by_pld = partial(PldAccountant, adjacency)
            found = _tightened(lambda z, each: spent(by_pld(each), z), start, epsilon)
            if spent(RdpAccountant(adjacency), found) <= PLD_UP_TO:
                return found
            # PLD would prove it, and is not asked there: the run would be said to cost more.
            return by_rdp(_TOLERANCE, epsilon=max(epsilon, PLD_UP_TO))
    return by_rdp(_TOLERANCE)


def _smallest(
    spent: Callable[[float], float], epsilon: float, delta: float, tolerance: float
) -> float:
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
    tolerance = min(tolerance, low / 50)
    found = float(brentq(lambda z: spent(z) - epsilon, low, high, xtol=tolerance))
    # The search ends within its tolerance on either side of the target: step onto the safe one.
    while spent(found) > epsilon:
        found += tolerance
    return found


def _tightened(by_pld: Callable[[float, float], float], by_rdp: float, epsilon: float) -> float:
    """Return a smaller noise multiplier where PLD, of a z and an interval, proves it is enough."""
    top = math.log(by_rdp)

    def crossing(interval: float, start: float, step: float, tolerance: float) -> float:
        """Return the logarithm of the z that costs ε; `start` is near, and `top` is enough."""

        @cache
        def excess(log: float) -> float:
            # ε is near a power of z, so that few steps find it.
            return math.log(max(by_pld(math.exp(log), interval), _LEAST) / epsilon)

        low = high = start
        while excess(high) > 0 and high < top:
            low, high, step = high, min(high + step, top), 2 * step
        while excess(low) <= 0 and low > math.log(_TOLERANCE):
            low, high, step = low - step, low, 2 * step
        if (excess(low) > 0) == (excess(high) > 0):
            return high
        return float(brentq(excess, low, high, xtol=tolerance))

    rough = crossing(_ROUGH_INTERVAL, top, 0.15, _TOLERANCE * 10)
    # What the coarse grid proves the fine one does as well, with a little less noise.
    start = min(rough + _TOLERANCE * 10, top)
    found = _up(math.exp(crossing(INTERVAL, start, 1e-4, _TOLERANCE / 10)))
    while by_pld(found, INTERVAL) > epsilon:
        found = float(_DIGITS.next_plus(Decimal(repr(found))))
    return min(found, by_rdp)


def _up(value: float) -> float:
    return float(_DIGITS.create_decimal(repr(value)))
