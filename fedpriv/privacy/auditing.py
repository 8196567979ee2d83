"""Privacy measured from outside: statistics of what an attacker can tell from the releases.

Canaries are made-up users, each of whom a fair coin lets in or leaves out. Whoever sees the
releases and nothing of the coins scores each canary: high for "was in". Two readings of the scores:

* a *lower bound* on ε that holds with a stated confidence (Steinke, Nasr, Jagielski 2023, "Privacy
  Auditing with One (1) Training Run"): no (ε, δ)-DP mechanism lets so many guesses be right;
* an *estimate* of ε, which is no bound (Andrew et al. 2023, "One-shot Empirical Privacy Estimation
  for Federated Learning"): the scores of both groups are taken for Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]

#: Which parts of the coins are guessed: the share with the highest scores to have been in, that
#: with the lowest to have been out; the rest is abstained from. Few guesses show most where the
#: scores overlap, many where they do not, and none of "out" where few users are sampled.
GUESSES = ((0.1, 0.1), (0.4, 0.4), (0.05, 0.0))

#: The false-positive rates at which membership scores are reported.
FALSE_POSITIVE_RATES = (0.01, 0.1)

_RESAMPLES = 400
# No number of guesses in any memory shows more.
_LARGEST_EPSILON = 60.0


# ---------------------------------------------------------------- scores


def inclusion_scores(projections: Floats, energies: Floats, rate: float, signed: bool) -> Floats:
    """Return each canary's log-likelihood ratio of "in" against "out" in one round: `[m]`.

    The release without what the attacker knows is R. Under noise N(0, Σ), a canary that
    contributes c, and is sampled with probability q, makes it more likely by

        log(1 - q + q·exp(p - n/2)),  p = c'Σ⁻¹R,  n = c'Σ⁻¹c,

    which the lemma of Neyman and Pearson makes the best score. What else is in R (other canaries,
    users that the attacker does not know) acts as further noise; its size is read off R.

    Args:
        projections: p, float64 `[m]`.
        energies: n, float64 `[m]`.
        rate: q, the probability with which a user is sampled in a round.
        signed: the coin decides between +c and -c, instead of c and nothing.
    """
    noise = max(1.0, _spread(projections / np.sqrt(energies), signed)) ** 2
    shift, half = projections / noise, energies / noise / 2
    if signed:
        return _sampled(shift - half, rate) - _sampled(-shift - half, rate)
    return _sampled(shift - half, rate)


def along_columns(projections: Floats, energies: Floats, column: Floats) -> tuple[Floats, Floats]:
    """Return p and n of what begins in each round of noise C⁻¹Z: float64 `[rounds, m]` each.

    What is released is y = x + C⁻¹Z, and Cy = Cx + Z has independent noise, in which a contribution
    to round t is spread as column t of C.

    Args:
        projections: of the releases y, as if their noise were Z, float64 `[rounds, m]`.
        energies: the same of the contributions.
        column: the first column of C, as long as there are rounds.
    """
    lower = np.tril(column[np.subtract.outer(np.arange(len(column)), np.arange(len(column)))])
    return lower.T @ (lower @ projections), (lower**2).sum(axis=0)[:, None] * energies


def allocated_scores(projections: Floats, energies: Floats, rounds: int, block: int) -> Floats:
    """Return each canary's log-likelihood ratio in a block that it is in one round of: `[m]`.

    Args:
        projections: p of the rounds that were run, float64 `[rounds, m]`.
        energies: n of them.
        rounds: how many were run.
        block: how many a block has; in the others, which were not, nothing was seen.
    """
    noise = max(1.0, _spread((projections / np.sqrt(energies)).ravel(), signed=False)) ** 2
    ratios = np.exp((projections - energies / 2) / noise)
    return np.log((ratios.sum(axis=0) + block - rounds) / block)


def _spread(standardised: Floats, signed: bool) -> float:
    """Return the size of the noise, however far the canaries that took part stand out of it.

    Those who are out, half of all, are noise alone, and have the smallest sizes, of which the
    middle one is taken. Where all are in with one sign or the other, the sizes scatter by the
    noise about where they stand. With no signal at all both say about half of the truth.
    """
    sizes = np.abs(standardised)
    if signed:
        return float(np.median(np.abs(sizes - np.median(sizes))) / stats.norm.ppf(0.75))
    return float(np.quantile(sizes, 0.25) / stats.norm.ppf(0.75))


def _sampled(log_ratio: Floats, rate: float) -> Floats:
    """Return log(1 - q + q·exp(x)) without overflow."""
    if rate >= 1:
        return log_ratio
    return np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio)


# ---------------------------------------------------------------- the lower bound


@dataclass(frozen=True)
class OneRunBound:
    """A lower bound on ε that is wrong with probability at most 1 - `confidence`.

    Attributes:
        epsilon: the bound; 0 where the guesses show nothing.
        delta: the δ that goes with it.
        confidence: of the statement "ε at this δ is at least `epsilon`".
        coins: m, how many users were in or out by coin.
        guesses: r, how many of the coins were to be guessed.
        correct: v, how many guesses were right.
        ceiling: what the bound would have been with every guess right: no audit with so many
            coins shows more.
    """

    epsilon: float
    delta: float
    confidence: float
    coins: int
    guesses: int
    correct: int
    ceiling: float


def one_run_bound(
    scores: Floats,
    included: Coins,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[tuple[float, float]] = GUESSES,
) -> OneRunBound:
    """Return the lower bound on ε at `delta` from the scores of users who were in by fair coin.

    The highest scores are guessed to have been in, the lowest to have been out, and the middle is
    abstained from. How many, is fixed by `guesses` before any score is seen. Each of several
    choices must hold at confidence 1 - (1 - confidence)/len(guesses) (union bound), so that the
    largest bound of all may be returned.

    The theorem counts coins that were tossed, and fixes how many are guessed before anything is
    seen. Whose score is known may depend on the releases. So a coin without a score (nan) is a
    coin too, on which no guess is made.

    Args:
        scores: float64 `[m]`, a function of the releases and of what is public; nan for none.
        included: boolean `[m]`, the coins.
        delta: the δ at which ε is bounded.
        confidence: of the bound.
        guesses: pairs of shares that are guessed in and out, as `GUESSES` has them.

    Raises:
        ValueError: scores and coins differ in length, or are too few for a single guess.
    """
    coins = len(scores)
    if len(included) != coins:
        raise ValueError(f"{coins} scores but {len(included)} coins")
    error = (1 - confidence) / len(guesses)
    order = np.argsort(scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))]
    found: list[tuple[float, int, int]] = []
    ceiling = 0.0
    for shares in guesses:
        highest, lowest = (int(coins * share) for share in shares)
        number = highest + lowest
        if number == 0:
            raise ValueError(f"{coins} coins are too few to guess shares of {shares} of them")
        # Few scores leave some of the guesses that were announced unmade, and so not right.
        first = max(0, len(order) - highest)
        in_, out = included[order[first:]], ~included[order[: min(lowest, first)]]
        correct = int(in_.sum() + out.sum())
        found.append((_least_epsilon(coins, number, correct, delta, error), number, correct))
        ceiling = max(ceiling, _least_epsilon(coins, number, number, delta, error))
    epsilon, number, correct = max(found)
    return OneRunBound(epsilon, delta, confidence, coins, number, correct, ceiling)


def guesses_p_value(coins: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how probable so many right guesses are, at most, under (ε, δ)-DP.

    Steinke et al. 2023, theorem 5.2: with W binomial of `guesses` trials of probability
    e^ε/(1 + e^ε) it is P[W ≥ v] + 2mδ·max_{1≤i≤v} P[v > W ≥ v - i]/i.
    """
    accuracy = special.expit(epsilon)
    tail = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if correct == 0 or delta == 0:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    slack = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * coins * delta * slack)


def _least_epsilon(coins: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """Return the smallest ε under which so many right guesses are not rejected."""

    def excess(epsilon: float) -> float:
        return guesses_p_value(coins, guesses, correct, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    if excess(_LARGEST_EPSILON) <= 0:
        return _LARGEST_EPSILON
    return float(optimize.brentq(excess, 0.0, _LARGEST_EPSILON))


def gaussian_bound(
    scores: Floats, included: Coins, delta: float, confidence: float = 0.95
) -> float:
    """Return a lower bound on ε at `delta` of a mechanism that is known to be Gaussian.

    Its trade-off curve is then one number μ, so that guesses say more than of (ε, δ) alone
    (Mahloujifar, Melis, Chaudhuri 2025, "Auditing f-Differential Privacy in One Run"). Of a
    mechanism that is not, as where users are sampled, it says nothing. Scores are guessed as in
    `one_run_bound`.
    """
    error = (1 - confidence) / len(GUESSES)
    coins = len(scores)
    order = np.argsort(scores, kind="stable")
    largest = 0.0
    for shares in GUESSES:
        highest, lowest = (int(coins * share) for share in shares)
        correct = included[order[coins - highest :]].sum() + (~included[order[:lowest]]).sum()
        largest = max(largest, _least_mu(coins, highest + lowest, int(correct), error))
    return _epsilon_of(largest, delta)


def _least_mu(coins: int, guesses: int, correct: int, error: float) -> float:
    """Return the smallest μ under which so many right guesses are not rejected."""
    low, high = 0.0, 1.0
    if not mu_refuted(coins, guesses, correct, low, error):
        return 0.0
    while mu_refuted(coins, guesses, correct, high, error):
        if high > _LARGEST_EPSILON:
            return high
        low, high = high, 2 * high
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if mu_refuted(coins, guesses, correct, middle, error) else (low, middle)
        )
    return low


def mu_refuted(coins: int, guesses: int, correct: int, mu: float, error: float) -> bool:
    """Say whether so many right guesses refute that a mechanism is μ-Gaussian private.

    The recursion of Mahloujifar et al. 2025, algorithm 3, for guesses of a bit: it bounds from
    below, one right guess less after another, how probable right and wrong guesses are together.
    """
    right, wrong = error * correct / coins, error * (guesses - correct) / coins
    for left in range(correct - 1, -1, -1):
        least = max(wrong, float(special.ndtr(special.ndtri(right) - mu)))
        if least == wrong:
            break  # nor do they change after this
        right = min(1.0, right + left / (guesses - left) * (least - wrong))
        wrong = least
    return right + wrong > guesses / coins


# ---------------------------------------------------------------- the one-shot estimate


@dataclass(frozen=True)
class OneShotEstimate:
    """An estimate of ε. No bound: it takes the statistics for Gaussians.

    Attributes:
        statistic: what was measured of each canary.
        epsilon: ε of the Gaussian mechanism that sets both groups so far apart.
        low: and `high`, between which ε is found when canaries are drawn again with replacement
            (basic bootstrap); each is left behind with the probability that was asked for.
        high: see `low`.
        delta: the δ that goes with it.
        observed: mean and standard deviation over the canaries that were in.
        unobserved: the same of those that were out (under replace-one: in with the other sign).
    """

    statistic: str
    epsilon: float
    low: float
    high: float
    delta: float
    observed: tuple[float, float]
    unobserved: tuple[float, float]


def one_shot_estimate(
    statistic: str,
    observed: Floats,
    unobserved: Floats,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
) -> OneShotEstimate:
    """Return the ε at `delta` between Gaussians fitted to both groups (Andrew et al. 2023, §3).

    One standard deviation is fitted to both, where the paper fits two: at a small δ, a chance
    difference between two fitted deviations would decide ε alone.

    Args:
        statistic: the name of what was measured.
        observed: float64 `[a]`, of canaries that were in.
        unobserved: float64 `[b]`, of canaries that were out.
        delta: the δ of the estimate.
        confidence: the probability that ε lies above `low`, and that it lies below `high`.
        generator: draws the resamples.

    Raises:
        ValueError: fewer than two canaries in a group.
    """
    if min(len(observed), len(unobserved)) < 2:
        raise ValueError("an estimate needs two canaries that were in and two that were out")
    apart = float(_separation(observed, unobserved))
    again = _separation(
        generator.choice(observed, (_RESAMPLES, len(observed))),
        generator.choice(unobserved, (_RESAMPLES, len(unobserved))),
    )
    low, high = 2 * apart - np.quantile(again, [confidence, 1 - confidence])
    return OneShotEstimate(
        statistic=statistic,
        epsilon=_epsilon_of(apart, delta),
        low=_epsilon_of(float(low), delta),
        high=_epsilon_of(float(high), delta),
        delta=delta,
        observed=(float(observed.mean()), float(observed.std(ddof=1))),
        unobserved=(float(unobserved.mean()), float(unobserved.std(ddof=1))),
    )


def _separation(observed: Floats, unobserved: Floats) -> Floats:
    """Return the distance of two groups' means in units of their common standard deviation."""
    degrees = observed.shape[-1] + unobserved.shape[-1] - 2
    squares = observed.var(-1) * observed.shape[-1] + unobserved.var(-1) * unobserved.shape[-1]
    return (observed.mean(-1) - unobserved.mean(-1)) / np.sqrt(squares / degrees)


def _epsilon_of(separation: float, delta: float) -> float:
    """Return ε of the Gaussian mechanism of multiplier 1/separation; 0 where there is none."""
    if separation <= 0:
        return 0.0
    return float(dp_accounting.get_epsilon_gaussian(1 / separation, delta))


# ---------------------------------------------------------------- membership of real users


@dataclass(frozen=True)
class TruePositives:
    """How many members a threshold finds.

    Attributes:
        false_positive_rate: the largest share of non-members above the threshold.
        rate: the share of members above it.
        low: and `high`, its confidence interval for this threshold (Clopper and Pearson 1934).
        high: see `low`.
    """

    false_positive_rate: float
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """How well scores tell the users who were in from those who were out.

    Attributes:
        members: users who were in and could be scored.
        others: users who were out and could be scored.
        auc: the probability that a member's score is the higher; 0.5 is guessing.
        auc_low: and `auc_high`, its confidence interval (Hanley and McNeil 1982).
        auc_high: see `auc_low`.
        true_positives: at each of `FALSE_POSITIVE_RATES`.
        bound: the lower bound on ε from the same scores.
    """

    members: int
    others: int
    auc: float
    auc_low: float
    auc_high: float
    true_positives: tuple[TruePositives, ...]
    bound: OneRunBound


def membership(
    scores: Floats,
    included: Coins,
    delta: float,
    confidence: float = 0.95,
    of_bound: float | None = None,
) -> Membership:
    """Return what the scores `[n]` of users who were in by fair coin, or out, say of membership.

    Args:
        scores: float64 `[n]`, high for "was in"; nan for a user whom nothing tells of.
        included: boolean `[n]`, the coins.
        delta: the δ of the bound.
        confidence: of each interval.
        of_bound: the confidence of the bound; None for that of the intervals.

    Raises:
        ValueError: nobody was in, nobody was out, or too few users for a bound.
    """
    known = ~np.isnan(scores)
    members, others = scores[included & known], scores[~included & known]
    if not len(members) or not len(others):
        raise ValueError("membership needs users who were in and users who were out")
    pairs = len(members) * len(others)
    auc = float(stats.mannwhitneyu(members, others).statistic) / pairs
    margin = stats.norm.ppf(0.5 + confidence / 2) * _auc_error(auc, len(members), len(others))
    return Membership(
        members=len(members),
        others=len(others),
        auc=auc,
        auc_low=max(0.0, auc - margin),
        auc_high=min(1.0, auc + margin),
        true_positives=tuple(
            _true_positives(members, others, rate, confidence) for rate in FALSE_POSITIVE_RATES
        ),
        bound=one_run_bound(scores, included, delta, of_bound or confidence),
    )


def _auc_error(auc: float, members: int, others: int) -> float:
    """Return the standard error of an AUC (Hanley and McNeil 1982, eq. 1)."""
    two_members, two_others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (
        auc * (1 - auc)
        + (members - 1) * (two_members - auc**2)
        + (others - 1) * (two_others - auc**2)
    ) / (members * others)
    return math.sqrt(max(0.0, variance))


def _true_positives(
    members: Floats, others: Floats, rate: float, confidence: float
) -> TruePositives:
    allowed = int(rate * len(others))
    threshold = np.sort(others)[::-1][min(allowed, len(others) - 1)]
    found = int((members > threshold).sum())
    interval = stats.binomtest(found, len(members)).proportion_ci(confidence, method="exact")
    return TruePositives(rate, found / len(members), float(interval.low), float(interval.high))
