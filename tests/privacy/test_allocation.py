"""Random allocation: the divergences of a block against closed forms, integrals and a library."""

import math
from itertools import pairwise

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, stats

from fedpriv.privacy.accounting import ORDERS, PldAccountant, RdpAccountant
from fedpriv.privacy.allocation import RandomAllocationDpEvent, _moments, renyi
from fedpriv.privacy.charging import charge
from fedpriv.privacy.sampling import Adjacency, RandomAllocation, build_sampling

ADD = Adjacency.ADD_OR_REMOVE_ONE
WHOLE = [2.0, 3.0, 5.0, 8.0, 16.0]


def block(rounds, noise):
    return RandomAllocationDpEvent(rounds, dp_accounting.GaussianDpEvent(noise))


def poisson(rounds, noise):
    return dp_accounting.PoissonSampledDpEvent(1 / rounds, dp_accounting.GaussianDpEvent(noise))


def rdp(event, count=1):
    accountant = RdpAccountant(ADD)
    accountant.compose(event, count)
    return accountant


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
def test_a_block_of_one_round_is_the_gaussian(noise):
    found = renyi(block(1, noise), WHOLE)
    np.testing.assert_allclose(found, np.array(WHOLE) / (2 * noise**2), rtol=1e-10)


@pytest.mark.parametrize(("rounds", "noise"), [(2, 0.7), (2, 1.0), (2, 3.0)])
def test_moments_of_two_rounds_are_integrals_over_the_plane(rounds, noise):
    goes, comes = _moments(rounds, noise)

    def moment(order):
        def density(x, y):
            ratio = (math.exp(x / noise) + math.exp(y / noise)) / 2 * math.exp(-0.5 / noise**2)
            return ratio**order * math.exp(-(x * x + y * y) / 2) / (2 * math.pi)

        return integrate.dblquad(density, -16, 16, -16, 16, epsabs=1e-12, epsrel=1e-9)[0]

    for order in (2, 3):
        assert math.exp(goes[order]) == pytest.approx(moment(order), rel=1e-7)
        assert math.exp(comes[order]) == pytest.approx(moment(-order), rel=1e-7)


@pytest.mark.parametrize(("rounds", "noise"), [(3, 1.0), (10, 0.8), (50, 2.0)])
def test_moments_where_a_user_goes_are_sums_over_all_partitions(rounds, noise):
    """E[L²] and E[L³] written out: pairs and triples of rounds that are the same or not."""
    goes, _ = _moments(rounds, noise)
    t, e = rounds, math.exp(1 / noise**2)
    assert math.exp(goes[2]) == pytest.approx((t * e + t * (t - 1)) / t**2, rel=1e-12)
    third = t * e**3 + 3 * t * (t - 1) * e + t * (t - 1) * (t - 2)
    assert math.exp(goes[3]) == pytest.approx(third / t**3, rel=1e-12)


@pytest.mark.parametrize(("rounds", "noise"), [(4, 1.0), (20, 1.5)])
def test_moments_where_a_user_comes_are_within_a_simulation(rounds, noise):
    _, comes = _moments(rounds, noise)
    normals = np.random.default_rng(5).standard_normal((400_000, rounds))
    ratios = np.exp(normals / noise - 1 / (2 * noise**2)).mean(axis=1)
    for order in (1, 2, 3):
        sampled = ratios**-order
        error = sampled.std() / math.sqrt(len(sampled))
        assert math.exp(comes[order]) == pytest.approx(sampled.mean(), abs=5 * error)


@pytest.mark.parametrize("noise", [0.8, 1.0, 3.0])
def test_more_rounds_and_more_noise_never_cost_more(noise):
    by_rounds = [renyi(block(t, noise), ORDERS) for t in (1, 2, 4, 16, 100, 1000)]
    for fewer, more in pairwise(by_rounds):
        finite = np.isfinite(fewer)
        assert (more[finite] <= fewer[finite] + 1e-12).all()
    noisier = renyi(block(16, 1.2 * noise), ORDERS)
    assert (noisier[np.isfinite(noisier)] <= by_rounds[3][np.isfinite(noisier)]).all()


@pytest.mark.parametrize(("rounds", "noise", "blocks"), [(32, 1.0, 10), (100, 2.0, 20)])
def test_a_run_costs_no_more_than_coins_would_and_no_less_than_it_is_sure_to(rounds, noise, blocks):
    """Against Poisson sampling of the same cohort, and against who is in every round of t² ones."""
    allocated = rdp(block(rounds, noise), blocks).epsilon(1e-6)
    coins = rdp(poisson(rounds, noise), rounds * blocks).epsilon(1e-6)
    unsampled = rdp(dp_accounting.GaussianDpEvent(noise), blocks).epsilon(1e-6)
    assert 0.5 * coins < allocated < coins
    assert allocated < unsampled


def test_between_whole_orders_the_bound_is_the_chord_of_the_moments():
    event = block(16, 1.0)
    low, high = renyi(event, [3.0, 4.0])
    (between,) = renyi(event, [3.5])
    assert between * 2.5 == pytest.approx((2 * low + 3 * high) / 2)
    assert math.isinf(renyi(event, [300.0])[0])


def losses(rounds, noise, draws, goes):
    """Losses of a block, drawn from the pair of distributions itself."""
    generator = np.random.default_rng(8)
    normals = generator.standard_normal((draws, rounds))
    if goes:
        normals[np.arange(draws), generator.integers(0, rounds, draws)] += 1 / noise
    found = np.log(np.exp(normals / noise - 1 / (2 * noise**2)).mean(axis=1))
    return found if goes else -found


@pytest.mark.parametrize("goes", [True, False])
@pytest.mark.parametrize(("rounds", "noise", "blocks"), [(8, 0.8, 1), (8, 0.8, 4)])
def test_no_hockey_stick_of_draws_is_above_what_is_charged(rounds, noise, blocks, goes):
    draws = losses(rounds, noise, 100_000 * blocks, goes).reshape(-1, blocks).sum(axis=1)
    accountants = [rdp(block(rounds, noise), blocks)]
    pytest.importorskip("PLD_accounting")
    tight = PldAccountant(ADD)
    tight.compose(block(rounds, noise), blocks)
    for epsilon in (0.5, 1.0, 2.0, 3.0):
        sampled = np.maximum(-np.expm1(epsilon - draws), 0)
        below = sampled.mean() - 5 * sampled.std() / math.sqrt(len(sampled))
        for accountant in (*accountants, tight):
            assert accountant.delta(epsilon) >= below


@pytest.mark.parametrize(("rounds", "noise", "blocks"), [(8, 0.8, 4), (16, 1.0, 10)])
def test_the_librarys_distribution_proves_less_than_renyi_and_more_than_is_true(
    rounds, noise, blocks
):
    library = pytest.importorskip("PLD_accounting")
    cost = charge({block(rounds, noise): blocks}, ADD, [1e-6]).first
    assert cost.accountant == "pld"
    assert cost.epsilon < cost.epsilon_rdp < 1.35 * cost.epsilon
    lower = library.gaussian_allocation_pld(
        params=library.PrivacyParams(sigma=noise, num_steps=rounds),
        config=library.AllocationSchemeConfig(
            loss_discretization=3e-2,
            convolution_method=library.ConvolutionMethod.GEOM,
        ),
        bound_type=library.BoundType.IS_DOMINATED,
    ).self_compose(blocks)
    assert lower.get_epsilon_for_delta(1e-6) <= cost.epsilon
    assert cost.epsilon < 1.1 * lower.get_epsilon_for_delta(1e-6)


def test_the_library_agrees_with_the_gaussian_where_a_block_is_one_round():
    pytest.importorskip("PLD_accounting")
    accountant, exact = PldAccountant(ADD), PldAccountant(ADD)
    accountant.compose(block(1, 2.0), 3)
    exact.compose(dp_accounting.GaussianDpEvent(2.0), 3)
    assert exact.epsilon(1e-5) * 0.9999 <= accountant.epsilon(1e-5) <= exact.epsilon(1e-5) * 1.02


def test_without_the_library_renyi_alone_decides(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PLD_accounting", None)
    cost = charge({block(9, 1.03): 2}, ADD, [1e-6]).first
    assert cost.accountant == "rdp"
    assert "fedpriv[allocation]" in cost.without_pld


def test_nothing_is_claimed_of_an_exchanged_user():
    with pytest.raises(dp_accounting.UnsupportedEventError):
        RdpAccountant(Adjacency.REPLACE_ONE).compose(block(4, 1.0))
    with pytest.raises(ValueError, match="come or go"):
        build_sampling("random_allocation", 100, None, Adjacency.REPLACE_ONE, 4)
    with pytest.raises(ValueError, match="needs a number of rounds"):
        build_sampling("random_allocation", 100, None)


def test_each_user_is_in_one_round_of_a_block_by_a_draw_of_its_own():
    sampling = RandomAllocation(40, 5)
    assert sampling.expected_cohort == 8
    generator = np.random.default_rng(3)
    drawn = np.array([sampling.allocated(generator) for _ in range(4000)])
    counts = np.array([(drawn == round_).sum(axis=0) for round_ in range(5)])
    assert stats.chisquare(counts.sum(axis=1)).pvalue > 1e-4
    assert counts == pytest.approx(800, abs=5 * math.sqrt(800 * 0.8))
    # Two users are in the same round as often as chance has it.
    assert (drawn[:, 0] == drawn[:, 1]).mean() == pytest.approx(0.2, abs=0.03)
