"""DiceSGD's ε against exact densities, closed forms and Opacus."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.special import logsumexp

from fedpriv.privacy import GlobalClipping, PoissonSampling, Unclipped
from fedpriv.privacy.dice import DiceMechanism
from fedpriv.privacy.dice_accounting import (
    dice_epsilon,
    dice_noise_multiplier,
    memory_sensitivity,
    provable_events,
    published_event,
)

ORDERS = (2, 3, 8)
# Shares σ_a²/σ² of the noise: the accountant's claim is the best of these at each order.
SHARES = tuple(1 / (1 + math.exp(-x / 4)) for x in range(-24, 25))


def mechanism(q, unit, c2, gradient=math.inf, z=None, population=1000):
    """Noise of standard deviation 1 on v_t (unless z is given), where C1/B = `unit`."""
    batch = q * population
    return DiceMechanism(
        PoissonSampling(population, batch),
        1 / unit if z is None else z,
        GlobalClipping(unit * batch),
        GlobalClipping(c2),
        Unclipped() if math.isinf(gradient) else GlobalClipping(gradient * unit * batch),
    )


def curve(events, order):
    accountant = rdp.RdpAccountant([order])
    for event, count in events:
        accountant.compose(event, count)
    return float(accountant.rdp[0])


def claimed(dice, steps, order):
    return min(curve(provable_events(dice, steps, share), order) for share in SHARES)


# The true divergence, in one dimension, by quadrature over all outputs and sampling bits of the
# example. A memory tells what e_t is, clipped, from the outputs so far and the example's bits so
# far; `bits` is None where the example is not in the data. What other examples add is in both.


def opposite_ends(bits, ys, unit, c2):
    return -c2 if bits is None else c2


def against_the_gradient(bits, ys, unit, c2):
    return c2 if bits is None else -c2


def tells_the_last_bit(bits, ys, unit, c2):
    return c2 if bits and bits[-1] else -c2


def follows_the_output(bits, ys, unit, c2):
    turn = np.tanh(2 * ys[-1]) if ys else 1.0
    return c2 * turn * (-1 if bits is None else 1)


def counts_and_follows(bits, ys, unit, c2):
    count = sum(bits or ()) / max(1, len(ys))
    return c2 * np.tanh(sum(ys, 0.0) + 4 * count - 2)


def recursion(gradient, others):
    """DiceSGD's own: the example's gradient is `gradient`·C1, the others leave `others` a step."""

    def memory(bits, ys, unit, c2):
        e = 0.0
        for bit in bits if bits is not None else (0,) * len(ys):
            e = e - np.clip(e, -c2, c2) + bit * (gradient - 1) * unit + others
        return np.clip(e, -c2, c2)

    return memory


MEMORIES = {
    "opposite ends": opposite_ends,
    "against the gradient": against_the_gradient,
    "tells the last bit": tells_the_last_bit,
    "follows the output": follows_the_output,
    "counts and follows": counts_and_follows,
    "DiceSGD, huge gradient": recursion(1e3, -1e2),
}


def log_density(memory, bits, ys, unit, c2):
    """The log density of outputs, without the example where `bits` is None."""
    total = 0.0
    for t, y in enumerate(ys):
        mean = memory(None if bits is None else bits[:t], ys[:t], unit, c2)
        mean = mean + (0.0 if bits is None else bits[t] * unit)
        total = total - (y - mean) ** 2 / 2 - math.log(2 * math.pi) / 2
    return total


def divergences(memory, q, unit, c2, steps, order):
    """The Rényi divergences of the outputs with from without the example, and the reverse."""
    reach = (2 * order - 1) * c2 + order * unit + 7
    points = np.linspace(-reach, reach, math.ceil(2 * reach / 0.4))
    ys = np.meshgrid(*[points] * steps, indexing="ij", sparse=True)
    shape = (len(points),) * steps
    without = np.broadcast_to(log_density(memory, None, ys, unit, c2), shape)
    terms = [
        np.broadcast_to(log_density(memory, bits, ys, unit, c2), shape)
        + sum(math.log(q if bit else 1 - q) for bit in bits)
        for bits in itertools.product((0, 1), repeat=steps)
        if q < 1 or all(bits)
    ]
    with_ = logsumexp(terms, axis=0)
    volume = steps * math.log(points[1] - points[0])
    for density in (with_, without):
        assert abs(logsumexp(density) + volume) < 1e-6
    return [
        (logsumexp(order * one - (order - 1) * other) + volume) / (order - 1)
        for one, other in ((with_, without), (without, with_))
    ]


SETTINGS = [  # q, C1/B, C2, rounds; noise of standard deviation 1
    (0.1, 1.0, 0.5, 2),
    (0.5, 1.0, 1.0, 2),
    (0.01, 2.0, 0.25, 2),
    (0.3, 0.5, 0.25, 3),
    (0.05, 0.8, 0.1, 3),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MEMORIES)
def test_no_memory_ever_leaks_more_than_the_provable_accounting_charges(name, setting):
    q, unit, c2, steps = setting
    for order in ORDERS:
        bound = claimed(mechanism(q, unit, c2), steps, order)
        found = divergences(MEMORIES[name], q, unit, c2, steps, order)
        assert max(found) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_worst_memory_leaks_a_good_part_of_what_is_charged(setting):
    """Most of it where the memory weighs most, half where a split wastes noise on rare samples."""
    q, unit, c2, steps = setting
    for order in ORDERS:
        bound = claimed(mechanism(q, unit, c2), steps, order)
        found = divergences(MEMORIES["opposite ends"], q, unit, c2, steps, order)
        assert max(found) > (0.8 if c2 >= unit / 2 else 0.45) * bound


@pytest.mark.parametrize("gradient", [1.0, 1.2, 2.0, 5.0])
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[3] == 3])
def test_a_bound_on_gradients_bounds_what_the_memory_leaks(setting, gradient):
    q, unit, c2, steps = setting
    for others, order in itertools.product((-2 * c2, -0.3 * unit, 0.0, 2 * c2), ORDERS):
        memory = recursion(gradient, others)
        bound = claimed(mechanism(q, unit, c2, gradient), steps, order)
        assert max(divergences(memory, q, unit, c2, steps, order)) <= bound * (1 + 1e-9)


def test_one_large_gradient_leaks_more_than_the_published_accounting_charges():
    """Without sampling all is Gaussian: a shift of C1/B, then of C1/B + 2·C2, in closed form."""
    unit, c2, order = 0.1, 1.0, 2
    dice = mechanism(1.0, unit, c2)
    memory = recursion(1e3, -10.0)
    found = max(divergences(memory, 1.0, unit, c2, 2, order))
    assert found == pytest.approx(order * (unit**2 + (2 * c2 + unit) ** 2) / 2, rel=1e-6)
    assert found > 100 * curve([(published_event(dice), 2)], order)
    assert found <= claimed(dice, 2, order)


# ε


SIZES = [(0.01, 1.0, 0.5, 100), (0.2, 0.1, 0.02, 50), (1.0, 0.02, 0.01, 20)]


@pytest.mark.parametrize(("q", "unit", "c2", "steps"), SIZES)
def test_no_split_gives_a_smaller_epsilon(q, unit, c2, steps):
    dice, delta = mechanism(q, unit, c2), 1e-5
    found = dice_epsilon(dice, steps, delta)
    for share in SHARES:
        accountant = rdp.RdpAccountant()
        sampled = dp_accounting.GaussianDpEvent(math.sqrt(share) / unit)
        memory = dp_accounting.GaussianDpEvent(math.sqrt(1 - share) / (2 * c2))
        accountant.compose(dp_accounting.PoissonSampledDpEvent(q, sampled), steps)
        accountant.compose(memory, steps)
        assert found.epsilon <= accountant.get_epsilon(delta) * 1.0005
    assert 0 < found.sampled_share < 1


def test_without_sampling_the_two_parts_are_one_gaussian_of_both_sensitivities():
    """The best split σ_a : σ_b = C1/B : 2·C2 makes α(C1/B + 2·C2)²/(2σ²) of the sum."""
    unit, c2, steps = 0.03, 0.02, 30
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1 / (unit + 2 * c2)), steps)
    found = dice_epsilon(mechanism(1.0, unit, c2), steps, 1e-6)
    assert found.epsilon == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-4)
    assert found.sampled_share == pytest.approx(unit / (unit + 2 * c2), abs=0.01)


def test_against_opacus():
    q, unit, c2, steps = 0.02, 0.5, 0.05, 200
    found = dice_epsilon(mechanism(q, unit, c2), steps, 1e-5)
    sampled, memory = found.sampled_share**0.5 / unit, (1 - found.sampled_share) ** 0.5 / (2 * c2)
    orders = list(range(2, 64))
    total = opacus_rdp.compute_rdp(
        q=q, noise_multiplier=sampled, steps=steps, orders=orders
    ) + opacus_rdp.compute_rdp(q=1.0, noise_multiplier=memory, steps=steps, orders=orders)
    epsilon, _ = opacus_rdp.get_privacy_spent(orders=orders, rdp=total, delta=1e-5)
    assert found.epsilon == pytest.approx(epsilon, rel=0.01)


def test_an_empty_memory_costs_nothing():
    plain = rdp.RdpAccountant()
    plain.compose(
        dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0)), 1000
    )
    dice = mechanism(0.01, 1.0, 0.0)
    for accounting in ("provable", "published"):
        found = dice_epsilon(dice, 1000, 1e-5, accounting)
        assert found.epsilon == pytest.approx(plain.get_epsilon(1e-5), rel=1e-9)
        assert dice_noise_multiplier(dice, 1000, found.epsilon, 1e-5, accounting) == pytest.approx(
            1.0, rel=1e-4
        )


def test_the_published_epsilon_is_that_of_dp_sgd_with_less_noise():
    plain = rdp.RdpAccountant()
    less = dp_accounting.GaussianDpEvent(2.0 / math.sqrt(1 + 2 * 0.75))
    plain.compose(dp_accounting.PoissonSampledDpEvent(0.05, less), 300)
    dice = mechanism(0.05, 1 / 50, 0.75, z=2.0)  # C1 = 1
    found = dice_epsilon(dice, 300, 1e-5, "published")
    assert found.epsilon == pytest.approx(plain.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize("accounting", ["provable", "published"])
@pytest.mark.parametrize(("q", "gradient"), [(0.1, math.inf), (1.0, 3.0), (0.1, 3.0)])
def test_calibrated_noise_meets_its_target_and_less_does_not(accounting, q, gradient):
    dice, steps, delta = mechanism(q, 0.01, 0.02, gradient), 100, 1e-5
    z = dice_noise_multiplier(dice, steps, 4.0, delta, accounting)
    spent = dice_epsilon(replace(dice, noise_multiplier=z), steps, delta, accounting)
    assert 3.99 < spent.epsilon <= 4.0
    less = replace(dice, noise_multiplier=z * 0.99)
    assert dice_epsilon(less, steps, delta, accounting).epsilon > 4.0


def test_pld_is_tighter_than_rdp():
    dice = mechanism(0.1, 0.2, 0.05)
    tight, loose = (dice_epsilon(dice, 50, 1e-5, accountant=name) for name in ("pld", "rdp"))
    assert 0.7 * loose.epsilon < tight.epsilon < loose.epsilon
    assert (tight.accountant, loose.accountant) == ("pld", "rdp")


def test_bounded_gradients_cost_the_smaller_of_two_sensitivities():
    loose, tight = mechanism(1.0, 0.001, 0.3, 1e9), mechanism(1.0, 0.001, 0.3, 4.0)
    assert memory_sensitivity(loose, 25, 25) == pytest.approx(2 * 0.3 * 5)
    assert memory_sensitivity(tight, 25, 10) == pytest.approx(10 * 3.0 * 0.001, rel=1e-5)
    assert memory_sensitivity(tight, 25, 10) >= 10 * 3.0 * 0.001
    whole = mechanism(1.0, 0.001, 0.3)
    assert dice_epsilon(tight, 25, 1e-5).epsilon < dice_epsilon(whole, 25, 1e-5).epsilon / 10


def test_rarely_sampled_examples_cost_less_at_a_part_of_delta():
    """Exact binomial tail; the parts of δ add up: δ ≥ δ_left + (1 + e^ε)·P[more than m batches]."""
    q, steps, delta = 0.05, 200, 1e-8
    dice = mechanism(q, 0.001, 0.3, 4.0, z=60.0)
    found = dice_epsilon(dice, steps, delta)
    chance = Fraction(1, 20)
    more = sum(
        math.comb(steps, k) * chance**k * (1 - chance) ** (steps - k)
        for k in range(found.participations + 1, steps + 1)
    )
    accountant = rdp.RdpAccountant()
    for event, count in provable_events(dice, steps, found.sampled_share, found.participations):
        accountant.compose(event, count)
    left = accountant.get_delta(found.epsilon)
    assert left + (1 + math.exp(found.epsilon)) * float(more) <= delta
    assert left > 0.98 * delta
    assert q * steps < found.participations < steps / 2
    every = rdp.RdpAccountant()
    for event, count in provable_events(dice, steps, found.sampled_share):
        every.compose(event, count)
    assert found.epsilon < every.get_epsilon(delta) / 2


def test_beyond_a_large_epsilon_every_participation_is_charged():
    dice = mechanism(0.05, 0.001, 0.3, 4.0, z=1.0)
    found = dice_epsilon(dice, 200, 1e-5)
    assert found.epsilon > 20
    assert found.participations == 200


def test_every_answer_says_which_accounting_it_is():
    dice = mechanism(0.1, 0.2, 0.05)
    proved, claim = (dice_epsilon(dice, 10, 1e-5, name) for name in ("provable", "published"))
    assert "proved" in proved.status
    assert "not proved" not in proved.status
    assert "claimed by the authors" in claim.status
    assert "not proved" in str(claim)
    assert claim.row()["accounting"] == "published"
    assert claim.row()["status"] == claim.status


def test_no_noise_is_no_privacy_and_no_step_costs_nothing():
    silent = mechanism(0.1, 0.2, 0.05, z=0.0)
    for accounting in ("provable", "published"):
        assert dice_epsilon(silent, 1, 1e-5, accounting).epsilon == math.inf
        assert dice_epsilon(silent, 0, 1e-5, accounting).epsilon == 0


def test_what_has_no_proof_is_refused():
    with pytest.raises(ValueError, match="provable or published"):
        dice_epsilon(mechanism(0.1, 0.2, 0.05), 1, 1e-5, "claimed")
