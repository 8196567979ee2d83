"""The privacy loss distribution of a sampled Gaussian, made of whole arrays.

It is dp-accounting's `from_gaussian_mechanism`, by its own parts. That one asks Python functions
for each of the tens of thousands of losses in turn, which takes most of the time of an answer.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray

# The smallest rate q that is not lost in 1 - q. A larger q costs more.
_SMALLEST_RATE = 1e-12


def sampled_gaussian(
    noise_multiplier: float, rate: float, interval: float
) -> PrivacyLossDistribution:
    """Return the distribution of one release, never below the truth.

    Args:
        noise_multiplier: z, of the noise over the sensitivity.
        rate: q, with which each user takes part, in (0, 1].
        interval: the distance of neighbouring losses; the smaller, the nearer to the truth.
    """
    rate = max(rate, _SMALLEST_RATE)
    kinds = (AdjacencyType.REMOVE, AdjacencyType.ADD)
    # Of a Gaussian that is not sampled both are the same.
    parts = [_one_sided(noise_multiplier, rate, interval, kind) for kind in kinds[: 1 + (rate < 1)]]
    return PrivacyLossDistribution(*parts)


def _one_sided(
    noise_multiplier: float, rate: float, interval: float, kind: AdjacencyType
) -> PLDPmf:
    """Return the distribution where a user goes, or comes (Doroshenko et al. 2022, algorithm 1)."""
    loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=rate, adjacency_type=kind)
    bounds = loss.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / interval)
    highest = math.ceil(bounds.epsilon_upper / interval)
    deltas = hockey_stick(loss, np.arange(lowest, highest + 1) * interval)
    return create_pmf_pessimistic_connect_dots_fixed_gap(interval, lowest, highest, deltas)


def hockey_stick(loss: GaussianPrivacyLoss, epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `loss.get_delta_for_epsilon(epsilons)`, δ at each ε: float64 `[n]`."""
    if loss.sampling_prob == 1:
        return _beyond(loss, epsilons, loss.inverse_privacy_loss(epsilons))
    # A user who goes has the losses of one who comes, with their signs exchanged.
    sign = 1 if loss.adjacency_type is AdjacencyType.REMOVE else -1
    rate, least = loss.sampling_prob, math.log1p(-loss.sampling_prob)
    deltas = np.where(sign > 0, -np.expm1(epsilons), 0.0)
    inside = sign * epsilons > least
    # The loss of the Gaussian alone, log((e^±ε - (1 - q)) / q), by which the place is known.
    high = sign * epsilons[inside] - math.log(rate)
    part = np.exp(least - math.log(rate) - high)
    with np.errstate(divide="ignore"):
        alone = sign * (high + np.log1p(-np.minimum(part, 1.0)))
    whole = GaussianPrivacyLoss(loss.standard_deviation, adjacency_type=loss.adjacency_type)
    deltas[inside] = _beyond(loss, epsilons[inside], whole.inverse_privacy_loss(alone))
    return deltas.clip(0, 1)


def _beyond(
    loss: GaussianPrivacyLoss, epsilons: NDArray[np.float64], places: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return δ at each ε from the place below which the loss is at least that."""
    lower = np.exp(epsilons + loss.mu_lower_log_cdf(places))
    return np.asarray(loss.mu_upper_cdf(places) - lower).clip(0, 1)
