"""What random allocation costs: each user takes part in exactly one of t rounds, drawn uniformly.

With a user the noisy sums of the t rounds are, in units of the sensitivity, the mixture over the
user's round i of N(e_i, z²I); without, N(0, z²I). Both laws, and that whatever a user sends from
round to round costs no more, are in docs/privacy.md, "Random allocation". The ratio of their
densities is L = (X_1 + ... + X_t)/t with independent X_i = exp(Z_i/z - 1/(2z²)), Z_i ~ N(0, 1), so
that a Rényi divergence is a moment of L: one at order α where the user goes, at 1 - α where it
comes.

Privacy loss distributions are those of PLD_accounting (Feldman, Shenfeld 2026).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp, ndtr

from fedpriv.privacy.rounding import UNIT

#: What privacy loss distributions of random allocation need.
NEEDED = "PLD_accounting (pip install 'fedpriv[allocation]')"

Floats = NDArray[np.float64]

# The distance of neighbouring losses; of noisier blocks, whose losses are smaller, a part of it. A
# finer grid proves up to a few percent less, and takes the square of its fineness in time.
_INTERVAL = 3e-2
# The probability that the distribution of a block may give to infinite losses.
_TAIL = 1e-13
# Moments of higher orders are not looked at, which can only raise ε.
_HIGHEST = 256
# Added for what quadrature may leave out, beside what is bounded: its error is far below.
_QUADRATURE = 1e-13
# Standard normals below the first have no weight, nor above the second.
_NORMALS = -38.0, 12.0
_NO_WEIGHT = 1e-300
# With less noise the integrals take too long, and ε is of no use.
_LEAST_NOISE = 0.05
# The logarithms of u between which is integrated; where that is too few, a bound stands alone.
_LOGARITHMS = -40.0, 60.0
# Steps of quadratures, in units of the scale on which the integrand changes: errors of the
# trapezoidal rule on what is analytic fall exponentially.
_STEP = 1 / 8


@dataclass(frozen=True)
class RandomAllocationDpEvent(dp_accounting.DpEvent):
    """A block of `rounds` releases of `event`, in one of which each user takes part."""

    rounds: int
    event: dp_accounting.GaussianDpEvent


def renyi(event: RandomAllocationDpEvent, orders: Sequence[float]) -> Floats:
    """Return a bound on the Rényi divergence of a block at `orders`, in both directions.

    At whole orders it is the divergence, but for rounding, which is added. Logarithms of moments
    are convex in the order, so between whole orders the chord is a bound.
    """
    goes, comes = _moments(event.rounds, event.event.noise_multiplier)
    found = np.empty(len(orders))
    for place, order in enumerate(orders):
        below, part = int(order), order - int(order)
        if below + (part > 0) > _HIGHEST:
            found[place] = np.inf
            continue
        logs = [
            moments[shift] * (1 - part) + (moments[shift + 1] * part if part else 0.0)
            for moments, shift in ((goes, below), (comes, below - 1))
        ]
        found[place] = max(logs) / (order - 1)
    return found


class NoDistribution(dp_accounting.UnsupportedEventError):
    """There is no privacy loss distribution of a block."""


@lru_cache(maxsize=8)
def loss_distribution(event: RandomAllocationDpEvent) -> PrivacyLossDistribution:
    """Return the distribution of a block, never below the truth; it takes seconds.

    Raises:
        NoDistribution: PLD_accounting is not installed, or has no distribution of this block.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # without Numba it takes longer
            import PLD_accounting as library
    except ImportError:
        raise NoDistribution(f"{NEEDED} is not installed") from None
    noise_multiplier = event.event.noise_multiplier
    try:
        return library.gaussian_allocation_pld(
            params=library.PrivacyParams(sigma=noise_multiplier, num_steps=event.rounds),
            config=library.AllocationSchemeConfig(
                loss_discretization=_INTERVAL / max(1.0, noise_multiplier),
                tail_truncation=_TAIL,
                convolution_method=library.ConvolutionMethod.GEOM,
            ),
        )
    except ValueError as error:  # as where its grid has too few points
        raise NoDistribution(f"PLD_accounting has none for this block ({error})") from None


@lru_cache(maxsize=32)
def _moments(rounds: int, noise_multiplier: float) -> tuple[Floats, Floats]:
    """Return log E[L^k] and log E[L^-k], k = 0, 1, ...: each as large as it is, or larger."""
    with np.errstate(over="ignore"):
        return _goes(rounds, noise_multiplier), _comes(rounds, noise_multiplier)


def _goes(rounds: int, noise_multiplier: float) -> Floats:
    """Return log E[L^k] = log k! [x^k] (Σ_j e^(j(j-1)/(2z²)) (x/t)^j / j!)^t."""
    k = np.arange(_HIGHEST + 1.0)
    sizes = k * (k - 1) / (2 * noise_multiplier**2) + gammaln(k + 1) + k * math.log(rounds)
    series = k * (k - 1) / (2 * noise_multiplier**2) - gammaln(k + 1) - k * math.log(rounds)
    power, left, products = np.where(k == 0, 0.0, -np.inf), rounds, 0
    while left:
        if left % 2:
            power, products = _product(power, series), products + 1
        left //= 2
        if left:
            series, products = _product(series, series), products + 1
    # A sum of logarithms is within so many units of its largest parts, after each product.
    rounding = 32 * UNIT * (products + 1) * (sizes + 1)
    moments = power + gammaln(k + 1) + rounding
    moments[:2] = 0.0  # E[1] and E[L] are 1
    return np.where(np.isfinite(moments), np.maximum(moments, 0.0), np.inf)


def _product(one: Floats, other: Floats) -> Floats:
    """Return the logarithms of the product of two series, of which they are logarithms."""
    n = np.arange(len(one))
    place = n[:, None] - n
    terms = np.where(place >= 0, one + other[place], -np.inf)
    return np.asarray(logsumexp(terms, axis=1))


def _comes(rounds: int, noise_multiplier: float) -> Floats:
    """Return log E[L^-k], by E[L^-k] = ∫ u^(k-1) E[e^-uL] du / Γ(k), E[e^-uL] = φ(u/t)^t.

    The mean is at least the geometric mean, so that E[L^-k] ≤ exp((k²/t + k)/(2z²)): that bounds
    what lies beyond the end of the integral, and stands alone where too much does.
    """
    k = np.arange(_HIGHEST + 1.0)
    bound = (k**2 / rounds + k) / (2 * noise_multiplier**2)
    if noise_multiplier < _LEAST_NOISE:
        return bound
    first, last = _LOGARITHMS
    # E[e^-uL] ≤ (m/e)^m u^-m E[L^-m] for every m.
    m = 2 * k + 2
    beyond = m * np.log(m) - m + (m**2 / rounds + m) / (2 * noise_multiplier**2)
    beyond += (k - m) * last - np.log(m - k)
    step = 2 * _STEP / math.sqrt(_HIGHEST)
    logs = np.arange(first, last, step)
    inside = logsumexp(k[1:, None] * logs + _laplace(logs, rounds, noise_multiplier), axis=1)
    before = k[1:] * first - np.log(k[1:])  # E[e^-uL] ≤ 1
    parts = np.stack([inside + math.log(step), before, beyond[1:]])
    found = logsumexp(parts, axis=0) - gammaln(k[1:]) + _QUADRATURE
    found = np.where(np.isfinite(found), np.minimum(found, bound[1:]), bound[1:])
    return np.concatenate([[0.0], np.maximum(found, 0.0)])


def _laplace(logs: Floats, rounds: int, noise_multiplier: float) -> Floats:
    """Return log E[e^-uL] = t log φ(u/t) where u = e^`logs`; what is left out is added."""
    step = _STEP * min(1.0, noise_multiplier)
    normals = np.arange(*_NORMALS, step)
    weights = np.exp(-(normals**2) / 2) * step / math.sqrt(2 * math.pi)
    # Beyond the last the integrand is at most what it is there.
    weights[-1] += ndtr(-normals[-1])
    ratios = np.exp(normals / noise_multiplier - 1 / (2 * noise_multiplier**2))
    found = np.empty(len(logs))
    for part in np.array_split(np.arange(len(logs)), max(1, len(logs) * len(normals) // 2**20)):
        scaled = np.exp(logs[part])[:, None] / rounds * ratios
        # Near 1 the difference to 1 is what is known to all digits.
        near = np.log1p(-np.minimum(-np.expm1(-scaled) @ weights, 0.9))
        far = np.log(np.exp(-scaled) @ weights + _NO_WEIGHT)
        found[part] = rounds * np.where(near > math.log(0.5), near, far)
    return found
