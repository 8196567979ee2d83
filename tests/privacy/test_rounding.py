"""No divergence comes out below the truth, however little of it float64 can hold.

The truth is computed with 60 digits, from series and integrals that lose none.
"""

import itertools
from decimal import Decimal, getcontext
from math import comb

import dp_accounting
import pytest

from fedpriv.privacy import Adjacency, RdpAccountant
from fedpriv.privacy.accounting import ORDERS, SMALLEST_DELTA, _rdp_curve

getcontext().prec = 60

RATES = (1e-9, 1.1e-6, 1e-3, 0.125, 0.49333, 0.999)
NOISES = (0.6, 2.46, 30.0, 1e3, 1e5)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def poisson(rate: float, noise: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))


def at(event: dp_accounting.DpEvent, adjacency: Adjacency, order: float) -> Decimal:
    return Decimal(float(_rdp_curve(event, adjacency, (order,))[0]))


def true_at_whole_order(rate: float, noise: float, order: int) -> Decimal:
    """Return ln(1 + Σ_{i≥2} C(α,i) q^i (1-q)^(α-i) (e^((i²-i)/2z²) - 1))/(α-1): no cancellation."""
    q, z = Decimal(rate), Decimal(noise)
    terms = (
        comb(order, i) * q**i * (1 - q) ** (order - i) * _expm1(Decimal(i * i - i) / (2 * z * z))
        for i in range(2, order + 1)
    )
    return _log1p(sum(terms, Decimal(0))) / (order - 1)


def true_at_any_order(rate: float, noise: float, order: Decimal) -> Decimal:
    """Return it by the trapezoidal rule, whose error here is below e^(-79z)."""
    q, z = Decimal(rate), Decimal(noise)
    step = z / 4
    count = int((2 * 15 * z + order) / step)
    total = Decimal(0)
    for k in range(count):
        x = -15 * z + k * step
        density = (-x * x / (2 * z * z)).exp() / (z * (2 * PI).sqrt())
        ratio = q * _expm1((2 * x - 1) / (2 * z * z))
        # The first two terms of the binomial series integrate to 1: they are left out.
        total += step * density * ((1 + ratio) ** order - 1 - order * ratio)
    return _log1p(total) / (order - 1)


def true_without_replacement(rate: Decimal, noise: float, order: int) -> Decimal:
    """Return the bound of Wang, Balle, Kasiviswanathan 2019, theorem 27, in exact differences."""
    z = Decimal(noise)
    moments = [(Decimal(k * (k - 1)) / (2 * z * z)).exp() for k in range(order + 3)]

    def difference(n: int) -> Decimal:
        return abs(sum((-1) ** (n - k) * comb(n, k) * moments[k] for k in range(n + 1)))

    total = Decimal(0)
    for i in range(2, order + 1):
        if i == 2:
            term = min(4 * _expm1(1 / (z * z)), 2 * moments[2])
        else:
            both = difference(2 * (i // 2)) * difference(2 * ((i + 1) // 2))
            term = min(4 * both.sqrt(), 2 * moments[i])
        total += rate**i * comb(order, i) * term
    return _log1p(total) / (order - 1)


def _expm1(x: Decimal) -> Decimal:
    return x.exp() - 1 if abs(x) > 1 else _series(x, lambda k: Decimal(1) / (k + 1))


def _log1p(x: Decimal) -> Decimal:
    return (1 + x).ln() if x > Decimal("1e-3") else _series(x, lambda k: -Decimal(k) / (k + 1))


def _series(x: Decimal, ratio) -> Decimal:
    term, total, k = x, Decimal(0), 1
    while abs(term) > abs(x) * Decimal("1e-55"):
        total += term
        term, k = term * x * ratio(k), k + 1
    return total


def test_the_truth_agrees_with_itself():
    for rate, noise in ((1e-3, 2.46), (0.49333, 1.0)):
        one = true_at_whole_order(rate, noise, 5)
        other = true_at_any_order(rate, noise, Decimal(5))
        assert abs(one / other - 1) < Decimal("1e-25")


@pytest.mark.parametrize(("rate", "noise"), itertools.product(RATES, NOISES))
def test_a_sampled_gaussian_is_never_below_the_truth_and_hardly_above(rate, noise):
    for order in (2, 3, 4, 12, 40, 63, 128):
        true = true_at_whole_order(rate, noise, order)
        found = at(poisson(rate, noise), Adjacency.ADD_OR_REMOVE_ONE, float(order))
        assert true <= found <= true * Decimal(1 + 1e-12) + Decimal("1e-11")


@pytest.mark.parametrize(("rate", "noise"), itertools.product(RATES, (1.0, 2.46, 100.0)))
def test_nor_is_it_at_fractional_orders(rate, noise):
    for order in ("1.1", "2.5", "9.9"):
        true = true_at_any_order(rate, noise, Decimal(order))
        assert true <= at(poisson(rate, noise), Adjacency.ADD_OR_REMOVE_ONE, float(order))


@pytest.mark.parametrize(("rate", "noise"), itertools.product((1e-6, 0.02, 0.2, 0.7), NOISES))
def test_nor_is_a_sample_without_replacement(rate, noise):
    users = 10**7
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        users, round(rate * users), dp_accounting.GaussianDpEvent(noise)
    )
    for order in (2, 3, 4, 7, 20, 40):
        true = true_without_replacement(Decimal(round(rate * users)) / users, noise, order)
        assert true <= at(event, Adjacency.REPLACE_ONE, float(order))


@pytest.mark.parametrize("noise", [1e3, 1e6, 1e8])
def test_nor_is_a_gaussian_and_what_is_composed_of_it(noise):
    gaussian = dp_accounting.GaussianDpEvent(noise)
    event = dp_accounting.SelfComposedDpEvent(poisson(1.0, noise), 7)
    for order in (1.1, 63.0, 1024.0):
        true = Decimal(order) / (2 * Decimal(noise) ** 2)
        assert at(gaussian, Adjacency.REPLACE_ONE, order) >= true
        assert at(event, Adjacency.ADD_OR_REMOVE_ONE, order) >= 7 * true


def test_many_compositions_lose_nothing():
    """One by one, as a run composes: in floats a million additions could lose 1e-10."""
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    gaussian = dp_accounting.GaussianDpEvent(1000.1)
    for _ in range(10_000):
        accountant.compose(gaussian)
    z, delta = Decimal("1000.1"), Decimal("1e-9")
    true = min(
        10_000 * a / (2 * z * z) + (1 - 1 / a).ln() - (delta * a).ln() / (a - 1)
        for a in map(Decimal, ORDERS)
    )
    assert true <= Decimal(accountant.epsilon(1e-9)) <= true * Decimal(1 + 1e-11)


def test_a_delta_that_rounding_decides_proves_nothing():
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(poisson(0.01, 1.0))
    assert accountant.epsilon(SMALLEST_DELTA) < 100
    assert accountant.epsilon(5e-324) == float("inf")
