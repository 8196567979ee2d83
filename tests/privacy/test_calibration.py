from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import pld

from fedpriv.privacy import (
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    PoissonSampling,
    RdpAccountant,
    affordable,
    charge,
    noise_multiplier_for,
)
from fedpriv.privacy.charging import Budget


@pytest.mark.parametrize(
    "sampling", [PoissonSampling(750, 370.0), FixedSizeSampling(750, 50), FullParticipation(750)]
)
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_calibrated_noise_meets_the_target_and_wastes_nothing(sampling, epsilon):
    def event_at(z: float) -> dp_accounting.DpEvent:
        return sampling.event(GaussianMechanism(z, GlobalClipping(0.1)))

    def spent(z: float) -> float:
        accountant = RdpAccountant(sampling.adjacency)
        accountant.compose(event_at(z), 60)
        return accountant.epsilon(1e-3)

    z = noise_multiplier_for(epsilon, 1e-3, 60, sampling.adjacency, event_at, ("rdp",))
    assert spent(z) <= epsilon
    assert spent(z - 1e-5) > epsilon


@pytest.mark.parametrize("epsilon", [30.0, 64.0, 99.0, 150.0])
def test_a_run_is_said_to_cost_no_more_than_its_target(epsilon):
    """By the rule that every statement goes by, which leaves PLD out where RDP proves little."""
    sampling = PoissonSampling(539, 50.0)

    def cost(z: float) -> float:
        event = sampling.event(GaussianMechanism(z, GlobalClipping(0.05)))
        return charge({event: 60}, sampling.adjacency, [1e-4]).first.epsilon

    z = noise_multiplier_for(
        epsilon,
        1e-4,
        60,
        sampling.adjacency,
        lambda z: sampling.event(GaussianMechanism(z, GlobalClipping(0.05))),
    )
    assert cost(z) <= epsilon < cost(z - 1e-4)


def test_affordable_rounds_is_the_last_round_within_the_budget():
    sampling = PoissonSampling(1000, 100.0)
    event = sampling.event(GaussianMechanism(1.0, GlobalClipping(1.0)))
    one_by_one = RdpAccountant(sampling.adjacency)
    count = 0
    while one_by_one.epsilon_after(event, 1e-5) <= 3.0:
        one_by_one.compose(event)
        count += 1
    budget = Budget(3.0, 1e-5, sampling.adjacency, ("rdp",))
    assert affordable(event, budget, 1000) == count
    assert affordable(event, budget, 2) == 2
    assert affordable(event, replace(budget, epsilon=1e-3), 1000) == 0


def test_a_target_that_no_noise_reaches_is_said():
    sampling = PoissonSampling(100, 10.0)
    with pytest.raises(ValueError, match="no noise multiplier reaches"):
        noise_multiplier_for(
            1.0, 1e-5, 10, sampling.adjacency, lambda z: dp_accounting.NonPrivateDpEvent()
        )


def test_the_tightest_accountant_decides_the_noise():
    sampling = PoissonSampling(750, 370.0)

    def event_at(z: float) -> dp_accounting.DpEvent:
        return sampling.event(GaussianMechanism(z, GlobalClipping(0.1)))

    found = noise_multiplier_for(8.0, 1e-3, 120, sampling.adjacency, event_at)
    assert found == pytest.approx(2.6783, abs=1e-4)  # by RDP it is 2.9288
    theirs = pld.PLDAccountant()
    theirs.compose(event_at(found), 120)
    assert 7.999 < theirs.get_epsilon(1e-3) <= 8
    # What a ledger makes of it, which rounds it down, must stay within the target too.
    charged = charge({event_at(found * (1 - 6e-12)): 120}, sampling.adjacency, [1e-3]).first
    assert (charged.accountant, charged.epsilon <= 8) == ("pld", True)


@pytest.mark.parametrize(
    ("sampling", "epsilon"),
    [(PoissonSampling(1000, 100.0), 0.01), (FullParticipation(100), 3.0)],
)
def test_little_less_noise_than_pld_asks_for_is_not_enough(sampling, epsilon):
    """Also where ε is as small as the steps of the grid that is asked first."""

    def spent(z: float) -> float:
        theirs = pld.PLDAccountant()
        theirs.compose(sampling.event(GaussianMechanism(z, GlobalClipping(1.0))), 10)
        return float(theirs.get_epsilon(1e-5))

    def event_at(z: float) -> dp_accounting.DpEvent:
        return sampling.event(GaussianMechanism(z, GlobalClipping(1.0)))

    found = noise_multiplier_for(epsilon, 1e-5, 10, sampling.adjacency, event_at)
    assert spent(found) <= epsilon < spent(found * (1 - 5e-6))


@pytest.mark.parametrize(
    ("population", "cohort", "rounds", "delta", "noise"),
    [(539, 200.0, 120, 1e-3, 2.0706), (2048, 256.0, 60, 1e-6, 0.9979)],
)
def test_the_shipped_recipes_need_less_noise_than_by_rdp(population, cohort, rounds, delta, noise):
    sampling = PoissonSampling(population, cohort)
    event = sampling.event(GaussianMechanism(noise, GlobalClipping(0.1)))
    cost = charge({event: rounds}, sampling.adjacency, [delta]).first
    assert 7.999 < cost.epsilon <= 8 < 8.8 < cost.epsilon_rdp


def test_without_replacement_pld_has_no_proof_and_rdp_decides():
    sampling = FixedSizeSampling(750, 50)

    def event_at(z: float) -> dp_accounting.DpEvent:
        return sampling.event(GaussianMechanism(z, GlobalClipping(0.1)))

    arguments = (8.0, 1e-3, 20, sampling.adjacency, event_at)
    z = noise_multiplier_for(*arguments)
    assert z == noise_multiplier_for(*arguments, ("rdp",))
    cost = charge({event_at(z): 20}, sampling.adjacency, [1e-3]).first
    assert (cost.accountant, cost.epsilon_pld) == ("rdp", None)
    assert "no proof" in (cost.without_pld or "")


def test_a_budget_is_held_against_the_tightest_and_counts_events_of_two_kinds():
    sampling = PoissonSampling(1000, 100.0)
    event, other = (
        sampling.event(GaussianMechanism(z, GlobalClipping(1.0))) for z in (1.0, 1.00001)
    )
    by_rdp = Budget(3.0, 1e-5, sampling.adjacency, ("rdp",), at_most=200)
    tight = replace(by_rdp, accountants=("rdp", "pld"))
    few, more = affordable(event, by_rdp, 200), affordable(event, tight, 200)
    assert few < more
    theirs = [pld.PLDAccountant(), pld.PLDAccountant()]
    for accountant, count in zip(theirs, (more, more + 1), strict=True):
        accountant.compose(event, count)
    assert theirs[0].get_epsilon(1e-5) <= 3 < theirs[1].get_epsilon(1e-5)
    assert tight.refuses({event: more - 1}, event) is None
    refused = tight.refuses({event: more}, event)
    assert refused is not None
    assert (refused.accountant, refused.epsilon > 3) == ("pld", True)
    assert tight.refuses({event: more - 1}, other) is None
    assert tight.refuses({event: more - 1, other: 1}, event) is not None
