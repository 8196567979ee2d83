"""The audit's statistics against closed forms, plain slow references and other libraries."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedpriv.privacy import (
    Adjacency,
    GaussianMechanism,
    GlobalClipping,
    PldAccountant,
    PoissonSampling,
)
from fedpriv.privacy.auditing import (
    GUESSES,
    gaussian_bound,
    guesses_p_value,
    inclusion_scores,
    membership,
    mu_refuted,
    one_run_bound,
    one_shot_estimate,
)

DELTA = 1e-4


def coin(m: int, generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 2, size=m).astype(bool)


# ---------------------------------------------------------------- the lower bound


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The theorem, term by term."""
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(binomial(r, k, p) for k in range(v, r + 1))
    slack = [sum(binomial(r, k, p) for k in range(v - i, v)) / i for i in range(1, v + 1)]
    return min(1.0, tail + 2 * m * delta * max(slack, default=0.0))


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("m", "r", "v"), [(50, 20, 17), (100, 100, 70), (30, 6, 6), (40, 10, 0)])
def test_the_p_value_is_the_theorem(m, r, v, delta):
    for epsilon in (0.0, 0.5, 2.0):
        slow = slow_p_value(m, r, v, epsilon, delta)
        assert guesses_p_value(m, r, v, epsilon, delta) == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("revealed", [1, 3, 10, 40])
def test_no_mechanism_beats_its_p_value(revealed):
    """Randomised response that now and then reveals some coins: (ε, δ)-DP, and tight for δ = 0.

    With probability mδ/i it shows i coins chosen at random, so that each is shown with
    probability δ; the law of right guesses is then known exactly.
    """
    m, epsilon, delta = 40, 1.0, 1e-3
    p = 1 / (1 + math.exp(-epsilon))
    shown = m * delta / revealed
    for v in range(m + 1):
        attained = (1 - shown) * stats.binom.sf(v - 1, m, p)
        attained += shown * stats.binom.sf(v - revealed - 1, m - revealed, p)
        assert attained <= guesses_p_value(m, m, v, epsilon, delta) + 1e-12
        assert stats.binom.sf(v - 1, m, p) == pytest.approx(guesses_p_value(m, m, v, epsilon, 0.0))


@pytest.mark.parametrize(("m", "r", "v", "delta"), [(400, 100, 90, 1e-5), (300, 200, 150, 1e-4)])
def test_the_bound_is_the_first_epsilon_that_is_not_rejected(m, r, v, delta):
    scores = np.concatenate([np.zeros(m - r), np.ones(r)]) + np.arange(m) * 1e-9
    included = np.zeros(m, dtype=bool)
    included[m - v :] = True  # of the r highest, v were in
    bound = one_run_bound(scores, included, delta, 0.95, [(r / m, 0.0)])
    assert (bound.guesses, bound.correct, bound.coins) == (r, v, m)
    below, above = bound.epsilon * 0.999, bound.epsilon * 1.001
    assert slow_p_value(m, r, v, below, delta) < 0.05 < slow_p_value(m, r, v, above, delta)


@pytest.mark.parametrize(("sigma", "true"), [(math.inf, 0.0), (2.0, None), (1.0, None)])
def test_the_bound_fails_no_more_often_than_its_confidence_allows(sigma, true):
    """One release of the plain Gaussian mechanism, 200 runs of 500 canaries, at 80% confidence.

    Without signal (σ = ∞) the union bound over the choices of guesses is put to the test: any
    bound above 0 is then wrong.
    """
    generator = np.random.default_rng(1)
    if true is None:
        true = dp_accounting.get_epsilon_gaussian(sigma, DELTA)
    wrong = 0
    for _ in range(200):
        included = coin(500, generator)
        scores = included / sigma + generator.standard_normal(500)
        wrong += one_run_bound(scores, included, DELTA, 0.8).epsilon > true
    assert wrong <= stats.binom.ppf(0.999, 200, 0.2)


def test_choosing_among_guesses_without_the_correction_would_fail():
    """The test above can fail: the best of many choices, each at full confidence, is wrong."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        included, scores = coin(500, generator), generator.standard_normal(500)
        choices = [(share, share) for share in np.linspace(0.02, 0.5, 12)]
        best = max(one_run_bound(scores, included, 0.0, 0.8, [c]).epsilon for c in choices)
        wrong += best > 0
    assert wrong > stats.binom.ppf(0.999, 200, 0.2)


def test_the_bound_has_power():
    """Clearly separated canaries show nearly what so many could show at all."""
    generator = np.random.default_rng(2)
    included = coin(1000, generator)
    bound = one_run_bound(6.0 * included + generator.standard_normal(1000), included, 1e-5)
    assert bound.epsilon > 0.95 * bound.ceiling > 4
    backwards = one_run_bound(-6.0 * included + generator.standard_normal(1000), included, 1e-5)
    assert backwards.epsilon == 0.0


def test_a_coin_without_a_score_is_a_coin_that_is_not_guessed():
    """Theorem 5.2 counts the coins that were tossed, m in 2mδ, whoever could be scored."""
    m, scored, delta = 400, 150, 1e-4
    scores = np.full(m, np.nan)
    scores[100 : 100 + scored] = np.arange(scored)
    included = np.zeros(m, dtype=bool)
    included[160:] = True  # of the 40 highest all were in, of the 40 lowest none
    bound = one_run_bound(scores, included, delta, 0.95, [(0.1, 0.1)])
    assert (bound.coins, bound.guesses, bound.correct) == (m, 80, 80)
    below, above = bound.epsilon * 0.999, bound.epsilon * 1.001
    assert slow_p_value(m, 80, 80, below, delta) < 0.05 < slow_p_value(m, 80, 80, above, delta)


def test_guesses_that_cannot_be_made_are_not_right():
    scores = np.full(100, np.nan)
    scores[:30] = np.arange(30)
    included = np.arange(100) >= 10  # of 40 + 40 announced guesses 30 are "in", none is "out"
    bound = one_run_bound(scores, included, 0.0, 0.95, [(0.4, 0.4)])
    assert (bound.coins, bound.guesses, bound.correct) == (100, 80, 20)


def test_too_few_coins_are_refused():
    with pytest.raises(ValueError, match="too few"):
        one_run_bound(np.zeros(8), np.zeros(8, dtype=bool), DELTA)
    with pytest.raises(ValueError, match="9 coins"):
        one_run_bound(np.zeros(8), np.zeros(9, dtype=bool), DELTA)
    assert all(sum(shares) <= 1 for shares in GUESSES)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_score_is_the_log_ratio_of_densities(rate, signed):
    """In three dimensions, with unequal noise, against the densities written out."""
    generator = np.random.default_rng(3)
    covariance = np.diag([0.5, 1.0, 2.0])
    canaries = generator.standard_normal((5, 3)) * 0.3
    released = generator.standard_normal(3) * 0.2
    precise = canaries @ np.linalg.inv(covariance)
    scores = inclusion_scores(precise @ released, (precise * canaries).sum(1), rate, signed)
    density = lambda mean: stats.multivariate_normal(mean, covariance).pdf(released)  # noqa: E731
    for canary, score in zip(canaries, scores, strict=True):
        nothing = density(np.zeros(3))
        there = (1 - rate) * nothing + rate * density(canary)
        other = (1 - rate) * nothing + rate * density(-canary) if signed else nothing
        assert score == pytest.approx(math.log(there / other), abs=1e-9)


def test_scores_do_not_overflow():
    huge = inclusion_scores(np.array([1e5, -1e5, 0.0]), np.full(3, 1e4), 0.01, signed=False)
    assert np.isfinite(huge).all()


@pytest.mark.parametrize("signed", [False, True])
def test_a_round_in_which_canaries_stand_out_outweighs_one_in_which_they_do_not(signed):
    """The size of the noise is read off the scores; signals must not pass for noise."""
    generator = np.random.default_rng(9)
    included = coin(500, generator)
    signal = np.where(included, 1.0, -1.0 if signed else 0.0)
    score = np.zeros(500)
    for strength in (0.0, 0.0, 30.0):
        standardised = strength * signal + generator.standard_normal(500)
        score += inclusion_scores(standardised / 3, np.full(500, 1 / 9), 1.0, signed)
    assert score[included].min() > score[~included].max()


def test_other_users_in_the_release_count_as_noise():
    generator = np.random.default_rng(10)
    drowned = 20 * generator.standard_normal(5000)
    scores = inclusion_scores(drowned, np.ones(5000), 0.5, signed=False)
    assert np.abs(scores).max() < 1.0  # and 20² = 400 if it were taken for signal


# ---------------------------------------------------------------- the estimate


def test_groups_that_do_not_differ_are_estimated_at_nothing():
    generator = np.random.default_rng(11)
    same = generator.standard_normal(500)
    found = one_shot_estimate("sum", same, same, DELTA, 0.95, generator)
    assert found.epsilon == found.low == 0.0
    with pytest.raises(ValueError, match="two canaries"):
        one_shot_estimate("sum", same, same[:1], DELTA, 0.95, generator)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_the_estimate_meets_the_analytic_epsilon_of_the_gaussian_mechanism(mu):
    """Sum of 4 rounds: the canary's statistic is N(2/z, 1), so ε is that of multiplier z/2."""
    generator = np.random.default_rng(4)
    found = one_shot_estimate(
        "sum",
        mu + generator.standard_normal(100_000),
        generator.standard_normal(100_000),
        DELTA,
        0.95,
        generator,
    )
    true = dp_accounting.get_epsilon_gaussian(1 / mu, DELTA)
    assert found.epsilon == pytest.approx(true, rel=0.05)
    assert found.low < found.epsilon < found.high
    assert found.observed == pytest.approx((mu, 1.0), abs=0.02)


def test_the_spread_of_the_estimate_covers_the_truth():
    generator = np.random.default_rng(5)
    true = dp_accounting.get_epsilon_gaussian(2.0, DELTA)
    above = 0
    for _ in range(60):
        observed, unobserved = generator.standard_normal((2, 250))
        found = one_shot_estimate("sum", 0.5 + observed, unobserved, DELTA, 0.95, generator)
        above += found.low > true
    assert above <= stats.binom.ppf(0.999, 60, 0.05)


# ---------------------------------------------------------------- sampled rounds


def test_the_bound_stays_below_the_accountant_over_sampled_rounds():
    """Poisson sampling in plain NumPy, 40 runs: as many failures as 80% confidence allows."""
    generator = np.random.default_rng(6)
    m, rate, z, rounds = 600, 0.2, 0.8, 6
    accountant = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    event = PoissonSampling(1000, 1000 * rate).event(GaussianMechanism(z, GlobalClipping(1.0)))
    accountant.compose(event, rounds)
    bounds = []
    for _ in range(40):
        included, scores = coin(m, generator), np.zeros(m)
        for _ in range(rounds):
            sampled = included & (generator.random(m) < rate)
            released = sampled + z * generator.standard_normal(m)
            scores += inclusion_scores(released / z**2, np.full(m, z**-2), rate, signed=False)
        bounds.append(one_run_bound(scores, included, DELTA, 0.8).epsilon)
    assert sum(b > accountant.epsilon(DELTA) for b in bounds) <= stats.binom.ppf(0.999, 40, 0.2)
    assert np.median(bounds) > 0.5  # and it says something


# ---------------------------------------------------------------- membership


def test_membership_against_scikit_learn_and_a_count():
    generator = np.random.default_rng(7)
    included = coin(400, generator)
    scores = 0.8 * included + generator.standard_normal(400)
    found = membership(scores, included, DELTA)
    assert found.auc == pytest.approx(roc_auc_score(included, scores))
    assert (found.members, found.others) == (included.sum(), (~included).sum())
    for each in found.true_positives:
        thresholds = np.sort(np.append(scores, -np.inf))
        allowed = each.false_positive_rate
        rates = [
            (scores[included] > t).mean()
            for t in thresholds
            if (scores[~included] > t).mean() <= allowed
        ]
        assert each.rate == pytest.approx(max(rates))
        assert each.low < each.rate < each.high


def test_users_who_cannot_be_scored_are_coins_of_the_bound_alone():
    generator = np.random.default_rng(9)
    included = coin(400, generator)
    scores = 3.0 * included + generator.standard_normal(400)
    scores[generator.integers(0, 400, 200)] = np.nan
    known = ~np.isnan(scores)
    found = membership(scores, included, DELTA)
    assert found.members + found.others == known.sum() < 400 == found.bound.coins
    assert found.auc == pytest.approx(roc_auc_score(included[known], scores[known]))
    # What would be claimed of those alone who could be scored is too much.
    assert found.bound.epsilon < membership(scores[known], included[known], DELTA).bound.epsilon


def test_the_interval_of_the_auc_covers_the_truth():
    generator = np.random.default_rng(8)
    true = stats.norm.cdf(0.5 / math.sqrt(2))
    covered = 0
    for _ in range(100):
        included = coin(200, generator)
        scores = 0.5 * included + generator.standard_normal(200)
        found = membership(scores, included, DELTA)
        covered += found.auc_low <= true <= found.auc_high
    assert stats.binom.ppf(0.001, 100, 0.95) <= covered


def test_membership_needs_both_groups():
    with pytest.raises(ValueError, match="who were out"):
        membership(np.zeros(100), np.ones(100, dtype=bool), DELTA)


# ---------------------------------------------------------------- of a Gaussian


def mu_of(epsilon: float, delta: float) -> float:
    return 1 / dp_accounting.get_sigma_gaussian(epsilon, delta)


@pytest.mark.parametrize(
    ("coins", "guesses", "correct", "error", "delta", "epsilon"),
    [
        (1000, 200, 150, 0.05, 1e-5, 1.2969160950579595),
        (1000, 800, 600, 0.05, 1e-5, 1.748482229274552),
        (1000, 1000, 800, 0.05, 1e-5, 2.3332435930207667),
        (500, 100, 99, 0.0166, 1e-3, 3.1889395102769797),
        (2000, 100, 80, 0.05, 1e-6, 1.4589904228601194),
        (1000, 100, 50, 0.05, 1e-5, 0.0),
    ],
)
def test_the_bound_of_a_gaussian_is_another_librarys(
    coins, guesses, correct, error, delta, epsilon
):
    """jax_privacy 2.0.0, `_epsilon_one_run_fdp`."""
    enough = mu_of(epsilon + 1e-4, delta) if epsilon else 1e-9
    assert not mu_refuted(coins, guesses, correct, enough, error)
    if epsilon:
        assert mu_refuted(coins, guesses, correct, mu_of(epsilon - 1e-4, delta), error)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_bound_of_a_plain_gaussian_stays_below_its_epsilon_and_says_more(mu):
    truth, said, others = dp_accounting.get_epsilon_gaussian(1 / mu, 1e-5), [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        included = generator.integers(0, 2, 1000).astype(bool)
        scores = mu * included + generator.standard_normal(1000)
        said.append(gaussian_bound(scores, included, 1e-5))
        others.append(one_run_bound(scores, included, 1e-5).epsilon)
    assert max(said) < truth
    assert np.mean(said) > np.mean(others)
    assert np.mean(said) > 0.3 * truth


def test_half_the_noise_is_more_than_the_bound_of_a_gaussian_allows():
    generator = np.random.default_rng(5)
    included = generator.integers(0, 2, 1000).astype(bool)
    scores = 2 * included + generator.standard_normal(1000)
    assert gaussian_bound(scores, included, 1e-5) > dp_accounting.get_epsilon_gaussian(1.0, 1e-5)
