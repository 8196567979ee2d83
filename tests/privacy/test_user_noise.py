"""What a user with noise of its own spends: in closed form, and by dp-accounting itself."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedpriv.privacy import (
    Adjacency,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    LocalMechanism,
    PayerAccounts,
    PerLayerClipping,
    PldAccountant,
    PoissonSampling,
    Release,
    most_charged,
    read_ledger,
)

Z, BOUND, DELTA = 3.0, 0.4, 1e-5
NOISE = LocalMechanism(PoissonSampling(4, 2.0), GaussianMechanism(Z, GlobalClipping(BOUND)))
TOOK_PART = [(0, 2), (2,), (), (0, 1, 2)]


def release(round_, users):
    return Release.of(round_, 0, NOISE, "digest", users)


RELEASES = [release(i, users) for i, users in enumerate(TOOK_PART, start=1)]


def by_dp_accounting(rounds):
    relation = Adjacency.REPLACE_ONE.relation
    accountant = RdpAccountant(neighboring_relation=relation)
    if rounds:
        accountant.compose(dp_accounting.GaussianDpEvent(Z / 2), rounds)
    return accountant.get_epsilon(DELTA) if rounds else 0.0


def test_a_message_is_an_unsampled_gaussian_of_half_the_multiplier():
    assert NOISE.event() == dp_accounting.GaussianDpEvent(Z / 2)
    assert RELEASES[0].event().noise_multiplier == pytest.approx(Z / 2, rel=1e-10)
    assert (RELEASES[0].sensitivity, RELEASES[0].stddev) == (
        pytest.approx(2 * BOUND),
        pytest.approx(Z * BOUND),
    )


def test_the_cost_is_that_of_two_gaussians_as_far_apart_as_two_contributions_can_be():
    """T messages are one Gaussian at distance μ = 2C√T/(zC); δ(ε) of that is known exactly."""
    accountant = PldAccountant(Adjacency.REPLACE_ONE)
    accountant.compose(RELEASES[0].event(), 3)
    epsilon, mu = accountant.epsilon(DELTA), 2 * BOUND * math.sqrt(3) / (Z * BOUND)
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(DELTA, rel=1e-3)


def test_each_user_pays_for_the_rounds_in_which_it_took_part():
    accounts = PayerAccounts(Adjacency.REPLACE_ONE, 4)
    accounts.charge_all(RELEASES)
    expected = [by_dp_accounting(2), by_dp_accounting(1), by_dp_accounting(3), 0.0]
    np.testing.assert_allclose(accounts.epsilons(DELTA), expected, rtol=1e-6)
    assert [each.round for each in most_charged(RELEASES)] == [1, 2, 4]


def test_a_ledger_keeps_who_paid(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path, Header("print", 4, DELTA, "replace_one", noise_by="users"))
    for each in RELEASES:
        ledger.append(each)
    assert read_ledger(path).releases == tuple(RELEASES)


def test_noise_per_block_costs_the_same():
    """Two contributions that are opposite, and as large as can be, in every block."""
    bounds = (0.3, 0.4, 1.2)
    mechanism = GaussianMechanism(Z, PerLayerClipping(1.3, bounds), per_block=True)
    distances = np.array([2 * bound for bound in bounds]) / mechanism.block_stddevs(3)
    assert np.linalg.norm(distances) == pytest.approx(1 / (Z / 2))
    released = Release.of(1, 0, LocalMechanism(PoissonSampling(4, 2.0), mechanism), "digest", (0,))
    assert released.event().noise_multiplier == pytest.approx(Z / 2, rel=1e-10)


def test_without_noise_there_is_no_privacy():
    silent = LocalMechanism(PoissonSampling(4, 2.0), GaussianMechanism(0.0, GlobalClipping(BOUND)))
    assert silent.event() == dp_accounting.NonPrivateDpEvent()
