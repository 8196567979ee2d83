import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from dp_accounting.privacy_accountant import NeighboringRelation
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRdp
from scipy import stats

from fedpriv.privacy import (
    Adjacency,
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    PldAccountant,
    PoissonSampling,
    RdpAccountant,
)
from fedpriv.privacy.accounting import ORDERS
from fedpriv.privacy.privacy_loss import hockey_stick, sampled_gaussian

ADD_REMOVE = Adjacency.ADD_OR_REMOVE_ONE


def mechanism(noise_multiplier: float) -> GaussianMechanism:
    return GaussianMechanism(noise_multiplier, GlobalClipping(0.3))


def poisson(noise_multiplier: float, population: int, cohort: float) -> dp_accounting.DpEvent:
    return PoissonSampling(population, cohort).event(mechanism(noise_multiplier))


GRID = list(
    itertools.product([0.6, 1.0, 2.5], [0.001, 0.01, 0.2], [10, 500, 3000, 20_000], [1e-5, 1e-9])
)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize(("noise", "rate", "rounds", "delta"), GRID)
def test_rdp_agrees_with_dp_accounting_and_with_opacus(noise, rate, rounds, delta):
    ours = RdpAccountant(ADD_REMOVE)
    for _ in range(10):
        ours.compose(poisson(noise, 10_000, 10_000 * rate), rounds // 10)
    theirs = rdp.RdpAccountant()
    theirs.compose(
        dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), rounds
    )
    # What dp-accounting answers, and what its rounding may have lost.
    assert 0 <= ours.epsilon(delta) / theirs.get_epsilon(delta) - 1 < 1e-7

    opacus = OpacusRdp()
    opacus.history = [(noise, rate, rounds)]
    assert ours.epsilon(delta) >= opacus.get_epsilon(delta, alphas=list(ORDERS)) * (1 - 1e-6)
    # Only at whole orders do both compute the divergence itself: see RdpAccountant.
    whole = tuple(order for order in ORDERS if order == int(order))
    at_whole = RdpAccountant(ADD_REMOVE, whole)
    at_whole.compose(poisson(noise, 10_000, 10_000 * rate), rounds)
    assert at_whole.epsilon(delta) == pytest.approx(
        opacus.get_epsilon(delta, alphas=list(whole)), rel=1e-3
    )


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "by_rdp", "by_pld"),
    [
        (1.0, 0.01, 1000, 2.101367, 1.8282),
        (1.1, 256 / 60000, 14000, 2.590377, 2.3759),
        (0.8, 0.05, 200, 8.743239, 7.7022),
    ],
)
def test_known_values(noise, rate, rounds, by_rdp, by_pld):
    event = poisson(noise, 60_000, 60_000 * rate)
    one, other = RdpAccountant(ADD_REMOVE), PldAccountant(ADD_REMOVE)
    one.compose(event, rounds)
    other.compose(event, rounds)
    assert one.epsilon(1e-5) == pytest.approx(by_rdp, abs=1e-6)
    assert other.epsilon(1e-5) == pytest.approx(by_pld, abs=1e-4)


def test_fixed_size_sampling_is_accounted_under_replace_one():
    sampling = FixedSizeSampling(10_000, 100)
    accountant = RdpAccountant(sampling.adjacency)
    accountant.compose(sampling.event(mechanism(1.0)), 1000)
    assert accountant.epsilon(1e-6) == pytest.approx(23.3, abs=0.05)


@pytest.mark.parametrize(("noise", "published"), [(0.01024, 1.1e7), (0.003072, 1.2e8)])
def test_published_points_of_speech_training(noise, published):
    """Pelikan et al. 2025: 1,024 of 34,753 users, about 2,000 rounds, δ = 1e-9."""
    accountant = RdpAccountant(ADD_REMOVE)
    accountant.compose(poisson(noise, 34_753, 1024.0), 2000)
    assert accountant.epsilon(1e-9) == pytest.approx(published, rel=0.08)


def test_heterogeneous_rounds_compose():
    events = [poisson(1.0, 1000, 10.0), poisson(2.0, 1000, 50.0), poisson(1.0, 1000, 10.0)]
    ours, theirs = RdpAccountant(ADD_REMOVE), rdp.RdpAccountant()
    tight, reference = PldAccountant(ADD_REMOVE), pld.PLDAccountant()
    for event in events:
        for accountant in (ours, theirs, tight, reference):
            accountant.compose(event)
    assert ours.epsilon(1e-6) == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-9)
    assert tight.epsilon(1e-6) == pytest.approx(reference.get_epsilon(1e-6), rel=1e-6)
    assert ours.delta(2.0) == pytest.approx(theirs.get_delta(2.0), rel=1e-9)


def test_full_participation_has_no_amplification():
    accountant = PldAccountant(ADD_REMOVE)
    accountant.compose(FullParticipation(1000).event(mechanism(3.0)), 4)
    # Four Gaussians of multiplier 3 are one of 1.5; the exact curve is that of Balle, Wang 2018.
    exact = dp_accounting.get_epsilon_gaussian(1.5, 1e-5)
    assert accountant.epsilon(1e-5) == pytest.approx(exact, rel=1e-3)


def test_a_single_round_without_noise_is_no_privacy_for_ever():
    for accountant in (RdpAccountant(ADD_REMOVE), PldAccountant(ADD_REMOVE)):
        accountant.compose(poisson(1.0, 100, 10.0), 5)
        accountant.compose(poisson(0.0, 100, 10.0))
        accountant.compose(poisson(1.0, 100, 10.0), 5)
        assert accountant.epsilon(1e-5) == float("inf")


def test_events_of_another_adjacency_are_refused():
    with pytest.raises(dp_accounting.UnsupportedEventError):
        RdpAccountant(Adjacency.REPLACE_ONE).compose(poisson(1.0, 100, 10.0))
    without_replacement = FixedSizeSampling(100, 10).event(mechanism(1.0))
    with pytest.raises(dp_accounting.UnsupportedEventError):
        RdpAccountant(ADD_REMOVE).compose(without_replacement)
    with pytest.raises(dp_accounting.UnsupportedEventError, match="no proof"):
        PldAccountant(Adjacency.REPLACE_ONE).compose(without_replacement)


def test_looking_ahead_composes_nothing():
    accountant = RdpAccountant(ADD_REMOVE)
    event = poisson(1.0, 1000, 100.0)
    ahead = accountant.epsilon_after(event, 1e-5, 7)
    assert accountant.epsilon(1e-5) == 0
    accountant.compose(event, 7)
    assert accountant.epsilon(1e-5) == ahead
    assert NeighboringRelation.ADD_OR_REMOVE_ONE is ADD_REMOVE.relation


@pytest.mark.parametrize("noise", [1e4, 1e6, 1e9])
def test_so_much_noise_that_rounding_decides_is_never_free(noise):
    """Even z = 1e6 leaves δ(0) = 1/(z·√(2π)) in one round: ε = 0 at δ = 1e-9 would be untrue."""
    event = poisson(noise, 1000, 10.0)
    ours, tight = RdpAccountant(ADD_REMOVE), PldAccountant(ADD_REMOVE)
    ours.compose(event, 1000)
    tight.compose(event, 1000)
    assert ours.epsilon(1e-9) > 0
    assert ours.epsilon(1e-9) >= tight.epsilon(1e-9)


def test_zero_out_costs_what_add_or_remove_costs():
    for kind in (RdpAccountant, PldAccountant):
        spent = []
        for adjacency in (Adjacency.ZERO_OUT, ADD_REMOVE):
            accountant = kind(adjacency)
            accountant.compose(poisson(1.0, 1000, 50.0), 100)
            spent.append(accountant.epsilon(1e-5))
        assert spent[0] == pytest.approx(spent[1], rel=1e-9)


def test_replace_one_doubles_the_sensitivity_once_whatever_the_accountant():
    """dp-accounting's PLD doubles it for REPLACE_ONE and its RDP does not: ours agree."""
    event = FullParticipation(1000, Adjacency.REPLACE_ONE).event(mechanism(3.0))
    exact = dp_accounting.get_epsilon_gaussian(1.5, 1e-5)
    tight, loose = PldAccountant(Adjacency.REPLACE_ONE), RdpAccountant(Adjacency.REPLACE_ONE)
    tight.compose(event)
    loose.compose(event)
    assert tight.epsilon(1e-5) == pytest.approx(exact, rel=1e-3)
    assert exact < loose.epsilon(1e-5) < 1.1 * exact
    with pytest.raises(dp_accounting.UnsupportedEventError):
        tight.compose(poisson(1.0, 1000, 50.0))


@pytest.mark.parametrize(
    ("noise", "rate", "rounds"),
    itertools.product([0.8, 1.0, 1.2, 1.5], [0.02, 0.05, 0.1, 0.2], [400, 1000]),
)
def test_pld_agrees_with_the_prv_accountant_of_opacus(noise, rate, rounds):
    """Gopi, Lee, Wutschitz 2021, another way to compose the same distributions."""
    ours, theirs = PldAccountant(ADD_REMOVE), PRVAccountant()
    ours.compose(poisson(noise, 10_000, 10_000 * rate), rounds)
    theirs.history = [(noise, rate, rounds)]
    for delta in (1e-5, 1e-7):
        assert ours.epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=0.02)


@pytest.mark.parametrize("noise", [1e-153, 1e-160])
def test_so_little_noise_that_the_series_overflows_is_no_privacy(noise):
    accountant = RdpAccountant(ADD_REMOVE)
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(event)
    assert accountant.epsilon(1e-5) > 1e300


def test_pld_claims_nothing_that_its_transforms_may_have_lost():
    """In 10,000 rounds dp-accounting's ε at 1e-12 has a true δ of 1.16e-12, at 1e-13 of 2.4e-13."""
    accountant, theirs = PldAccountant(ADD_REMOVE), pld.PLDAccountant()
    # Sampled at 1: a Gaussian that is composed like any other, of which the exact curve is known.
    event = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(100.0))
    accountant.compose(event, 10_000)
    theirs.compose(event, 10_000)
    for delta in (1e-6, 1e-10, 2e-11):
        exact = dp_accounting.get_epsilon_gaussian(1.0, delta)
        assert exact <= accountant.epsilon(delta) < 1.1 * exact
    assert theirs.get_epsilon(1e-12) < dp_accounting.get_epsilon_gaussian(1.0, 1e-12)
    for delta in (1e-11, 1e-12, 1e-14, 1e-15):
        assert accountant.epsilon(delta) == float("inf")
    for epsilon in (1.0, 5.0, 8.0):
        # Balle and Wang 2018, theorem 8, for a noise multiplier of 1.
        cdf = stats.norm.cdf
        exact = cdf(0.5 - epsilon) - math.exp(epsilon) * cdf(-0.5 - epsilon)
        assert accountant.delta(epsilon) >= exact


_RATES = [1e-12, 1e-6, 0.01, 0.49, 0.99, 1.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [AdjacencyType.ADD, AdjacencyType.REMOVE])
@pytest.mark.parametrize(("noise", "rate"), itertools.product([0.3, 1.0, 30.0, 1e6], _RATES))
def test_divergences_of_whole_arrays_are_those_of_dp_accounting(noise, rate, kind):
    loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=kind)
    bounds = loss.connect_dots_bounds()
    step = max((bounds.epsilon_upper - bounds.epsilon_lower) / 99, 1e-4)
    edge = math.log1p(-rate) if rate < 1 else 0.0  # beyond it, or minus it, nothing is told
    around = [sign * edge + by for sign in (-1, 1) for by in (-1e-6, 1e-6)]
    epsilons = np.array([*(bounds.epsilon_lower // step + np.arange(101)) * step, *around])
    theirs = loss.get_delta_for_epsilon(epsilons)
    assert hockey_stick(loss, epsilons) == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_distribution_of_a_release_is_that_of_dp_accounting(rate):
    ours = sampled_gaussian(1.5, rate, 1e-3)
    theirs = from_gaussian_mechanism(1.5, sampling_prob=rate, value_discretization_interval=1e-3)
    for one, other in ((ours, theirs), (ours.self_compose(30), theirs.self_compose(30))):
        found, expected = (
            each.get_delta_for_epsilon([0.0, 0.5, 1.0, 3.0]) for each in (one, other)
        )
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-17])
@pytest.mark.filterwarnings("error")
def test_rates_that_are_lost_in_one_minus_them_are_accounted_for(rate):
    accountant = PldAccountant(ADD_REMOVE)
    event = dp_accounting.GaussianDpEvent(1.0)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, event), 10)
    assert accountant.epsilon(1e-5) == 0  # all that 10 releases can tell has less probability
    assert 0 < accountant.delta(0) < 1e-10
