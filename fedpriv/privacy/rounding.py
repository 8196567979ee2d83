"""How far below the truth floating point may have left what dp-accounting computes.

A Rényi divergence comes from log A(α), A(α) = 1 + something that may be far below float64's
resolution: a rounding in the logarithm of a term then is as large as the divergence. Everything
here bounds such roundings from above, to be added to what was computed.

Bounds are in units of u = 2⁻⁵³. Those on special functions take SciPy's `gammaln` and `log_ndtr`
to be within 4 u of their value, relatively.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln, log_ndtr

UNIT = 2.0**-53
# The logarithm of a term is made of at most six parts, each within 4 u, and five additions.
_OF_A_TERM = 16 * UNIT
# Adding a term to a logarithm: log1p, exp, a difference and a sum.
_OF_AN_ADDITION = 8 * UNIT
# A term that is smaller than the sum by more than this leaves it as it is, to the last bit.
_VANISHES = 38.0
# dp-accounting stops a series of a fractional order where both its terms are below e^-30 of it,
# after 1,000 terms at the latest.
_STOPS, _TERMS = 30.0, 1000

#: Whatever is computed from divergences and δ by a few operations is within this, relatively.
CONVERSION = 64 * UNIT


def of_poisson_sampling(rate: float, noise_multiplier: float, order: float, found: float) -> float:
    """Bound the rounding of `found`, the divergence of a Poisson-sampled Gaussian at `order`.

    Returns inf where no bound is known, as where numbers overflow.
    """
    log_a = found * (order - 1)
    whole = float(order).is_integer()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if whole:
            terms, sizes = _whole_terms(rate, noise_multiplier, order)
        else:
            terms, sizes = _fractional_terms(rate, noise_multiplier, order)
        weights = np.exp(terms - log_a)
        bound = _OF_A_TERM * np.sum(weights * sizes)
        partial = np.logaddexp.accumulate(terms)
        additions = 3 * np.count_nonzero(terms > partial - _VANISHES)
        bound += _OF_AN_ADDITION * additions * (1 + abs(log_a))
        if not whole:
            # Terms fall at least as fast as a harmonic series, so the last stands for all beyond.
            left_out = weights[terms < log_a - _STOPS + 1]
            bound += np.sum(left_out) + _TERMS * weights[-2:].sum()
    return float(bound / (order - 1)) if np.isfinite(bound) else np.inf


def _whole_terms(
    rate: float, noise_multiplier: float, order: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithms of the terms of A at a whole order, and the sizes of their parts."""
    i = np.arange(order + 1)
    comb, size = _log_binomials(order, i)
    drawn, not_drawn = i * np.log(rate), (order - i) * np.log1p(-rate)
    shift = (i * i - i) / (2 * noise_multiplier**2)
    return comb + drawn + not_drawn + shift, size - drawn - not_drawn + shift


def _fractional_terms(
    rate: float, noise_multiplier: float, order: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of both series at a fractional order (Mironov et al. 2019, section 3.3)."""
    i = np.arange(float(_TERMS))
    j = order - i
    comb, size = _log_binomials(order, i)
    turn = noise_multiplier**2 * np.log(1 / rate - 1) + 0.5
    log_q, log_1mq = np.log(rate), np.log1p(-rate)
    terms, sizes = [], []
    for drawn, point in ((i, turn - i), (j, j - turn)):
        tail = log_ndtr(point / noise_multiplier)
        # An error in the point moves the tail by up to its slope, about |point|/z².
        slope = (abs(point) + noise_multiplier) * (abs(point) + abs(turn)) / noise_multiplier**2
        other = order - drawn
        shift = (drawn * drawn - drawn) / (2 * noise_multiplier**2)
        terms.append(comb + drawn * log_q + other * log_1mq + shift + tail)
        parts = abs(drawn * log_q) + abs(other * log_1mq) + abs(shift) + abs(tail)
        sizes.append(size + parts + slope)
    # In the order in which they are added, one of each series in turn.
    return np.stack(terms, axis=1).ravel(), np.stack(sizes, axis=1).ravel()


def _log_binomials(order: float, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = gammaln(order + 1), gammaln(i + 1), gammaln(order - i + 1)
    return parts[0] - parts[1] - parts[2], sum(abs(part) for part in parts)


def of_sampling_without_replacement(rate: float, order: float, found: float) -> float:
    """Bound the rounding of `found`, the bound on the divergence of a fixed-size sample.

    Its second term has 1 - e^(-1/z²), which loses all digits at a large z: up to 4 u·e^(1/z²) in
    each of the α(α-1)/2 pairs. The others come from differences that lose theirs to cancellation,
    which makes them too large where it decides: see the tests.
    """
    return 64 * UNIT * (1 + order**2) * rate**2 + 1e-9 * found
