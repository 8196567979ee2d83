"""The attacker's bounds against closed forms."""

import dp_accounting
import pytest
from scipy.stats import norm

from fedpriv.privacy import Adjacency, PldAccountant, RdpAccountant
from fedpriv.reporting.attacker import FALSE_POSITIVE_RATES, strongest_attacker


@pytest.mark.parametrize("mu", [0.25, 1.0, 3.0])
def test_one_gaussian_gives_its_closed_form(mu: float) -> None:
    accountant = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(1 / mu))
    attacker = strongest_attacker(accountant)
    for rate, bound in zip(FALSE_POSITIVE_RATES, attacker.true_positives, strict=True):
        exact = norm.cdf(norm.ppf(rate) + mu)
        assert exact <= bound == pytest.approx(exact, rel=2e-3)
    exact = 2 * norm.cdf(mu / 2) - 1
    assert attacker.advantage == pytest.approx(exact, rel=2e-3)


def test_composition_of_gaussians_is_one_gaussian() -> None:
    accountant = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 4)
    exact = norm.cdf(norm.ppf(0.01) + 0.5)
    assert strongest_attacker(accountant).true_positives[0] == pytest.approx(exact, rel=2e-3)


def test_rdp_is_never_below_pld() -> None:
    rdp, pld = (
        accountant(Adjacency.ADD_OR_REMOVE_ONE) for accountant in (RdpAccountant, PldAccountant)
    )
    for accountant in (rdp, pld):
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.1)), 200
        )
    loose, tight = strongest_attacker(rdp), strongest_attacker(pld)
    assert loose.advantage >= tight.advantage
    for loose_rate, tight_rate in zip(loose.true_positives, tight.true_positives, strict=True):
        assert 1 >= loose_rate >= tight_rate > 0.001


def test_nothing_bounds_the_attacker_without_privacy() -> None:
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.NonPrivateDpEvent())
    attacker = strongest_attacker(accountant)
    assert (attacker.advantage, *attacker.true_positives) == (1.0, 1.0, 1.0)
