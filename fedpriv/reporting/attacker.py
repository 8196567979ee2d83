"""What an attacker could do: from a δ(ε) curve to membership inference.

The attacker knows everything but one thing, whether a given user took part (or, under replace-one,
which of two users did), and has seen every release. Its test has a false-positive rate and a
true-positive rate (TPR). For every ε ≥ 0 at which (ε, δ(ε)) holds,

    TPR ≤ e^ε·FPR + δ(ε)    and    1 − FPR ≤ e^ε·(1 − TPR) + δ(ε)

(Kairouz, Oh, Viswanath 2015), so the least of these bounds over ε is the most that it can reach.
With the exact δ(ε) of a privacy-loss distribution this is the trade-off curve itself, symmetrised
(Dong, Roth, Su 2022, Prop. 6); with RDP's δ(ε) it is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedpriv.privacy.accounting import Accountant

#: The false-positive rates at which reports say what an attacker reaches.
FALSE_POSITIVE_RATES = (0.01, 0.001)

# Where the bounds are tried before the best is refined. Each is valid, so the grid decides only
# how near to the least one the answer comes.
_GRID = np.concatenate([np.linspace(0, 20, 81), np.geomspace(21, 500, 20)])
_ZOOMS, _POINTS = 3, 9


@dataclass(frozen=True)
class Attacker:
    """The most that any attacker can do.

    Attributes:
        advantage: largest TPR − FPR: 0 is guessing, 1 is certainty.
        true_positives: the largest TPR at each of `FALSE_POSITIVE_RATES`.
    """

    advantage: float
    true_positives: tuple[float, ...]


def strongest_attacker(accountant: Accountant) -> Attacker:
    """Return what the releases that `accountant` has composed allow an attacker, at most."""
    curve = _Curve.of(accountant)
    return Attacker(
        advantage=curve.least(_advantage_bound),
        true_positives=tuple(
            curve.least(lambda e, d, rate=rate: _tpr_bound(e, d, rate))  # type: ignore[misc]
            for rate in FALSE_POSITIVE_RATES
        ),
    )


@dataclass(frozen=True)
class _Curve:
    """δ(ε), with its values on the grid kept."""

    delta: Callable[[float], float]
    on_grid: tuple[float, ...]

    @classmethod
    def of(cls, accountant: Accountant) -> _Curve:
        return cls(accountant.delta, tuple(accountant.delta(float(e)) for e in _GRID))

    def least(self, bound: Callable[[float, float], float]) -> float:
        """Return the least `bound(ε, δ(ε))` over ε ≥ 0, at most 1.

        Both bounds fall and then rise with ε, so zooming in on the best point finds the least.
        """
        epsilons = _GRID
        tried = [bound(e, d) for e, d in zip(epsilons, self.on_grid, strict=True)]
        for _ in range(_ZOOMS):
            best = int(np.argmin(tried))
            below, above = epsilons[max(0, best - 1)], epsilons[min(len(epsilons) - 1, best + 1)]
            epsilons = np.linspace(below, above, _POINTS)
            tried = [bound(float(e), self.delta(float(e))) for e in epsilons]
        return min(1.0, *tried)


def _tpr_bound(epsilon: float, delta: float, false_positive_rate: float) -> float:
    return min(
        math.exp(epsilon) * false_positive_rate + delta,
        1 - math.exp(-epsilon) * max(0.0, 1 - delta - false_positive_rate),
    )


def _advantage_bound(epsilon: float, delta: float) -> float:
    # (e^ε − 1 + 2δ)/(e^ε + 1), written so that a large ε does not overflow.
    shrunk = math.exp(-epsilon)
    return (1 - shrunk + 2 * delta * shrunk) / (1 + shrunk)
